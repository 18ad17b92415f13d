/* Convolutions of 3x3 pixels with narrow numbers, by Winograd's F(2x2, 3x3) (Lavin and Gray, CVPR 2016): two by two output pixels from
   four by four of the input by sixteen products where there were 36. With floats it rounds; with these numbers it is exact, for all
   that is transformed fits a byte:

   - weights, transformed by 2G instead of G, are whole numbers and the products four times too large, which a shift undoes. They are
     transformed at every call, for as many tiles at once that it takes no time worth saving: kept, they would need 16 bytes where
     there were 9.
   - inputs are codes 0 to top. Each transformed one is a sum of two of them less two others, so `2 top` more is no less than 0; but
     for the one at ALL, a sum of four. The zero point is in that one alone: in all others it stands against itself.

   What is added, and the zero point, is known before: the sums of products begin at what they are worth. Inputs lie channels last.

   Whoever includes this has included immintrin.h, and said how wide vectors are (BYTES), how many output channels make a block of weights (OUT) and how many tiles
   are multiplied with it at once (TILES), and has a `multiply_tiles` that does it. */

#include <omp.h>
#include <stdint.h>
#include <string.h>

#define KERNEL 9  /* pixels of the kernel, three by three */
#define PLACES 16 /* transformed numbers of a tile, four by four */
#define ALL 5     /* the one that is a sum without differences */
#define NEAR 524288 /* bytes of transformed inputs that a thread makes at once, which stay in its second cache */

typedef uint8_t Codes __attribute__((vector_size(BYTES)));
typedef uint32_t Sums __attribute__((vector_size(BYTES)));
typedef int32_t Signed __attribute__((vector_size(BYTES)));
typedef float Floats __attribute__((vector_size(BYTES)));
#define LANES (BYTES / 4)

/* Codes, [images, height, width, channels], with one pixel around each image. */
typedef struct {
    int64_t images, height, width, channels;
} Image;

/* codes: [blocks, fours, KERNEL, OUT, 4], what is no weight 0; sums: of transformed ones over channels, [blocks, PLACES, OUT]; for each
   output channel what makes floats of sums, [blocks * OUT]. most: how often two products with transformed inputs fit 16 bits. */
typedef struct {
    const int8_t *codes;
    const int32_t *sums;
    const float *scale, *bias;
    int64_t out, most;
} Kernels;

/* Sums of products of TILES rows of inputs, `apart` bytes from each other, with a block of transformed weights, [count, OUT, 4]; sums:
   [TILES, OUT], which begin at `start`, [OUT]. */
static void multiply_tiles(const uint8_t *inputs, int64_t apart, const int8_t *weights, int64_t count, const int32_t *start, int64_t most,
                           int32_t *sums);

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t fours(int64_t channels) { return (channels + 3) / 4; }

#if BYTES == 64
static inline __mmask64 some(int64_t count) { return ~0ULL >> (BYTES - count); }

static inline Codes take(const void *from, int64_t count) { return (Codes)_mm512_maskz_loadu_epi8(some(count), from); }

static inline void put(void *to, Codes bytes, int64_t count) { _mm512_mask_storeu_epi8(to, some(count), (__m512i)bytes); }
#else
static inline Codes take(const void *from, int64_t count) {
    Codes bytes = {0};
    memcpy(&bytes, from, count);
    return bytes;
}

static inline void put(void *to, Codes bytes, int64_t count) { memcpy(to, &bytes, count); }
#endif

static inline Sums take_sums(const int32_t *from) {
    Sums sums;
    memcpy(&sums, from, BYTES);
    return sums;
}

/* Tiles that a thread transforms before it multiplies them: whole groups of TILES, as many of its share as are near, all parts alike. */
static int64_t together(int64_t channels, int64_t tiles, int64_t threads) {
    int64_t share = (tiles + threads * TILES - 1) / (threads * TILES), near = NEAR / (PLACES * 4 * fours(channels) * TILES);
    int64_t parts = near ? (share + near - 1) / near : share;
    return TILES * ((share + parts - 1) / parts);
}

/* Tiles of `side` by `side` output pixels that cover images. */
static int64_t tiles_of(Image image, int64_t side) {
    return image.images * ((image.height + side - 1) / side) * ((image.width + side - 1) / side);
}

/* How far places of transformed weights are apart: a line of the cache more than a power of two, for they are written together. */
static int64_t places_apart(int64_t channels) { return fours(channels) * 4 * OUT + 64; }

/* Bytes of a thread's transformed weights, and with them of its transformed inputs. */
static int64_t weight_space(int64_t channels) { return PLACES * places_apart(channels); }

static int64_t own_space(int64_t channels, int64_t part) {
    return weight_space(channels) + (PLACES * 4 * fours(channels) * part + BYTES - 1) / BYTES * BYTES;
}

/* Bytes that `convolve_tiles` needs for its own. */
int64_t space_of(Image image, int32_t threads) {
    return threads * own_space(image.channels, together(image.channels, tiles_of(image, 2), threads)) + image.channels;
}

/* 2G g for three vectors. */
#define SPREAD_WEIGHTS(a, b, c, to, step)                                                                                         \
    {                                                                                                                             \
        Codes ends = a + c;                                                                                                       \
        (to)[0] = a + a, (to)[step] = ends + b, (to)[2 * step] = ends - b, (to)[3 * step] = c + c;                                \
    }

/* A block of weights, [count, KERNEL, OUT, 4] -> transformed ones, PLACES of [count, OUT, 4], `apart` bytes from each other. */
static void transform_weights(const int8_t *from, int64_t count, int8_t *to, int64_t apart) {
    for (int64_t four = 0; four < count; four++, from += KERNEL * OUT * 4, to += OUT * 4)
        for (int64_t at = 0; at < OUT * 4; at += BYTES) {
            Codes half[12], done[PLACES];
            for (int j = 0; j < 3; j++) {
                Codes g[3];
                for (int i = 0; i < 3; i++)
                    g[i] = take(from + (3 * i + j) * OUT * 4 + at, BYTES);
                SPREAD_WEIGHTS(g[0], g[1], g[2], half + j, 3)
            }
            for (int i = 0; i < 4; i++)
                SPREAD_WEIGHTS(half[3 * i], half[3 * i + 1], half[3 * i + 2], done + 4 * i, 1)
            for (int place = 0; place < PLACES; place++)
                put(to + place * apart + at, done[place], BYTES);
        }
}

/* B'd for four vectors. */
#define SPREAD(a, b, c, d, to, step) (to)[0] = a - c, (to)[step] = b + c, (to)[2 * step] = c - b, (to)[3 * step] = b - d

/* `count` channels of a tile from `c` on: pixels, each channels of codes -> transformed inputs, PLACES of them, `apart` bytes from
   each other. */
static inline void transform(const uint8_t *const *pixels, int64_t c, int64_t count, uint8_t *to, int64_t apart, int32_t top) {
    Codes half[PLACES], done[PLACES];
    for (int j = 0; j < 4; j++) {
        Codes d[4];
        for (int i = 0; i < 4; i++)
            d[i] = take(pixels[4 * i + j] + c, count);
        SPREAD(d[0], d[1], d[2], d[3], half + j, 4);
    }
    for (int i = 0; i < 4; i++)
        SPREAD(half[4 * i], half[4 * i + 1], half[4 * i + 2], half[4 * i + 3], done + 4 * i, 1);
    for (int place = 0; place < PLACES; place++)
        put(to + place * apart + c, place == ALL ? done[place] : done[place] + (uint8_t)(2 * top), 4 * fours(count));
}

typedef struct {
    int64_t image, row, column;
} Tile;

static Tile tile_at(int64_t index, Image image, int64_t side) {
    int64_t across = (image.width + side - 1) / side, down = (image.height + side - 1) / side;
    Tile tile = {index / across / down, index / across % down * side, index % across * side};
    return tile;
}

/* The pixels of a tile's input, `span` by `span`; those beside the image are `nothing`. */
static void find_pixels(Tile tile, Image image, int span, const uint8_t *codes, const uint8_t *nothing, const uint8_t **pixels) {
    for (int i = 0; i < span; i++)
        for (int j = 0; j < span; j++) {
            int64_t y = tile.row + i - 1, x = tile.column + j - 1;
            int inside = y >= 0 && y < image.height && x >= 0 && x < image.width;
            int64_t at = ((tile.image * image.height + y) * image.width + x) * image.channels;
            pixels[span * i + j] = inside ? codes + at : nothing;
        }
}

/* Transformed inputs of tiles from `first` on, [groups, PLACES, TILES, 4 * fours]; those behind the last tile are the last again. */
static void transform_tiles(const uint8_t *codes, Image image, int64_t first, int64_t groups, const uint8_t *nothing, int32_t top,
                            uint8_t *to) {
    int64_t apart = 4 * fours(image.channels), last = tiles_of(image, 2) - 1, whole = image.channels / BYTES * BYTES;
    for (int64_t i = 0; i < groups * TILES; i++) {
        const uint8_t *pixels[PLACES];
        uint8_t *own = to + (i / TILES * PLACES * TILES + i % TILES) * apart;
        find_pixels(tile_at(least(first + i, last), image, 2), image, 4, codes, nothing, pixels);
        for (int64_t c = 0; c < whole; c += BYTES)
            transform(pixels, c, BYTES, own, TILES * apart, top);
        if (whole < image.channels)
            transform(pixels, whole, image.channels - whole, own, TILES * apart, top);
    }
}

/* A'm for four vectors. */
#define GATHER(a, b, c, d, to, step) (to)[0] = a + b + c, (to)[step] = b - c - d

/* Sums of one tile, PLACES of them, `apart` numbers from each other, as two by two pixels of a block's output channels. */
static void write_tile(const int32_t *sums, int64_t apart, Tile tile, Image image, const Kernels *kernels, int64_t channel, float scale,
                       float *out) {
    for (int64_t c = channel; c < channel + OUT && c < kernels->out; c += LANES, sums += LANES) {
        Floats factor, bias;
        memcpy(&factor, kernels->scale + c, BYTES);
        memcpy(&bias, kernels->bias + c, BYTES);
        factor *= scale;
        Sums half[8], done[4];
        for (int j = 0; j < 4; j++) {
            Sums m[4];
            for (int i = 0; i < 4; i++)
                m[i] = take_sums(sums + (4 * i + j) * apart);
            GATHER(m[0], m[1], m[2], m[3], half + j, 4);
        }
        for (int i = 0; i < 2; i++)
            GATHER(half[4 * i], half[4 * i + 1], half[4 * i + 2], half[4 * i + 3], done + 2 * i, 1);
        int64_t count = least(LANES, kernels->out - c);
        for (int64_t i = 0; i < 2 && tile.row + i < image.height; i++)
            for (int64_t j = 0; j < 2 && tile.column + j < image.width; j++) {
                int64_t pixel = (tile.image * image.height + tile.row + i) * image.width + tile.column + j;
                Floats value = __builtin_convertvector((Signed)done[2 * i + j] >> 2, Floats) * factor + bias;
                if (count == LANES)
                    put(out + pixel * kernels->out + c, (Codes)value, BYTES);
                else
                    put(out + pixel * kernels->out + c, (Codes)value, 4 * count);
            }
    }
}

/* What the sums of products begin at, [PLACES, OUT]. */
static void find_start(const int32_t *sums, int32_t top, int32_t zero_point, int32_t *start) {
    for (int place = 0; place < PLACES; place++)
        for (int c = 0; c < OUT; c++)
            start[place * OUT + c] = -(place == ALL ? 4 * zero_point : 2 * top) * sums[place * OUT + c];
}

/* codes, 0 to top <= 63 -> out, [images, height, width, out]: `scale * kernels.scale` times the sums of (code - zero_point) * weight over
   windows, plus the bias. space: `space_of` bytes. */
void convolve_tiles(const uint8_t *codes, Image image, Kernels kernels, float scale, int32_t zero_point, int32_t top, uint8_t *space,
                    float *out, int32_t threads) {
    int64_t tiles = tiles_of(image, 2), part = together(image.channels, tiles, threads), own = own_space(image.channels, part);
    int64_t count = fours(image.channels), apart = 4 * count, blocks = (kernels.out + OUT - 1) / OUT;
    uint8_t *nothing = space + threads * own;
    memset(nothing, zero_point, image.channels);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t first = 0; first < tiles; first += part) {
        int8_t *made = (int8_t *)space + omp_get_thread_num() * own;
        uint8_t *inputs = (uint8_t *)made + weight_space(image.channels);
        int64_t groups = (least(part, tiles - first) + TILES - 1) / TILES;
        transform_tiles(codes, image, first, groups, nothing, top, inputs);
        for (int64_t block = 0; block < blocks; block++) {
            int32_t sums[PLACES * TILES * OUT], start[PLACES * OUT];
            transform_weights(kernels.codes + block * KERNEL * apart * OUT, count, made, places_apart(image.channels));
            find_start(kernels.sums + block * PLACES * OUT, top, zero_point, start);
            for (int64_t tile = 0; tile < groups * TILES; tile += TILES) {
                for (int64_t place = 0; place < PLACES; place++)
                    multiply_tiles(inputs + (tile * PLACES + place * TILES) * apart, apart, made + place * places_apart(image.channels), count,
                                   start + place * OUT, kernels.most, sums + place * TILES * OUT);
                for (int64_t i = tile; i < tile + TILES && first + i < tiles; i++)
                    write_tile(sums + (i - tile) * OUT, TILES * OUT, tile_at(first + i, image, 2), image, &kernels, block * OUT, scale, out);
            }
        }
    }
}
