/* Products of bytes on x86 processors with AVX-512 VNNI, where a call of oneDNN costs more than small ones of them, or narrow numbers
   need fewer than it makes.

   Matrices: rows of codes times weights.

   Convolutions of 3x3 pixels with narrow numbers, by Winograd's F(2x2, 3x3) (Lavin and Gray, CVPR 2016): two by two output pixels from
   four by four of the input by sixteen products where there were 36. With floats it rounds; with these numbers it is exact, for all
   that is transformed fits a byte:

   - weights, transformed by 2G instead of G, are whole numbers and the products four times too large, which a shift undoes. They are
     transformed at every call, for as many tiles at once that it takes no time worth saving: kept, they would need 16 bytes where
     there were 9.
   - inputs are codes 0 to top. Each transformed one is a sum of two of them less two others, so `2 top` more is no less than 0; but
     for the one at ALL, a sum of four. The zero point is in that one alone: in all others it stands against itself.

   What is added, and the zero point, is known before: the sums of products begin at what they are worth. Inputs lie channels last. */

#include <stdint.h>
#include <string.h>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
int32_t exists(void) { return 1; }
#else
int32_t exists(void) { return 0; }
#endif

/* Whether it is the best that there is here: matrix units multiply bytes so much faster that fewer products gain nothing. */
int32_t helps(void) {
#if defined(__AMX_INT8__)
    return 0;
#else
    return exists();
#endif
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#include <omp.h>

#define KERNEL 9  /* pixels of the kernel, three by three */
#define PLACES 16 /* transformed numbers of a tile, four by four */
#define ALL 5     /* the one that is a sum without differences */
#define OUT 32    /* output channels of a block of weights: two vectors of sums */
#define TILES 12  /* multiplied with it at once: 24 vectors of sums, of the 32 that a processor has */
#define BYTES 64  /* in a vector */
#define ROWS 96   /* of a matrix for which a block of weights is read once: whole TILES */
#define ALONE 2097152 /* products that one thread has made before another has begun */
#define NEAR 524288 /* bytes of transformed inputs that a thread makes at once, which stay in its second cache */

/* Codes, [images, height, width, channels], with one pixel around each image. */
typedef struct {
    int64_t images, height, width, channels;
} Image;

/* codes: [blocks, pixels, fours, OUT, 4] with KERNEL pixels or one, what is no weight 0; sums: of them over channels, [blocks, pixels,
   OUT], of transformed ones where there are KERNEL; for each output channel, [blocks * OUT]: a number that each code lacks, and what
   makes floats of sums. */
typedef struct {
    const int8_t *codes;
    const int32_t *sums, *rest;
    const float *scale, *bias;
    int64_t out;
} Weights;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t fours(int64_t channels) { return (channels + 3) / 4; }

/* Tiles that a thread transforms before it multiplies them: whole groups of TILES, as many of its share as are near, all parts alike. */
static int64_t together(int64_t channels, int64_t tiles, int64_t threads) {
    int64_t share = (tiles + threads * TILES - 1) / (threads * TILES), near = NEAR / (PLACES * 4 * fours(channels) * TILES);
    int64_t parts = near ? (share + near - 1) / near : share;
    return TILES * ((share + parts - 1) / parts);
}

static int64_t tiles_of(Image image) { return image.images * ((image.height + 1) / 2) * ((image.width + 1) / 2); }

/* Bytes of a thread's transformed weights, and with them of its transformed inputs. */
static int64_t weight_space(int64_t channels) { return PLACES * fours(channels) * 4 * OUT; }

static int64_t own_space(int64_t channels, int64_t part) {
    return weight_space(channels) + (PLACES * 4 * fours(channels) * part + BYTES - 1) / BYTES * BYTES;
}

/* Bytes that `convolve` needs for its own. */
int64_t space_of(Image image, int32_t threads) {
    return threads * own_space(image.channels, together(image.channels, tiles_of(image), threads)) + image.channels;
}

static inline __m512i repeat_four(const uint8_t *bytes) {
    int32_t four;
    memcpy(&four, bytes, sizeof four);
    return _mm512_set1_epi32(four);
}

/* Sums of products of TILES rows of inputs, `apart` bytes from each other, with a block of weights, [count, OUT, 4]; sums: [TILES, OUT],
   which begin at `start`, [OUT]. */
static __attribute__((noinline)) void multiply(const uint8_t *inputs, int64_t apart, const int8_t *weights, int64_t count,
                                               const int32_t *start, int32_t *sums) {
    /* Compilers that may load inputs or weights again or all at once find no register for the sums: an empty statement that changes
       them is in the way. */
#define FOR_TILES(DO) DO(0, 0) DO(1, 0) DO(2, 0) DO(0, 1) DO(1, 1) DO(2, 1) DO(0, 2) DO(1, 2) DO(2, 2) DO(0, 3) DO(1, 3) DO(2, 3)
#define BEGIN(i, j) __m512i low##i##j = below, high##i##j = above;
#define MULTIPLY(i, j)                                                                                                            \
    {                                                                                                                             \
        __m512i x = repeat_four(row##j + i * apart);                                                                              \
        low##i##j = _mm512_dpbusd_epi32(low##i##j, x, first);                                                                     \
        high##i##j = _mm512_dpbusd_epi32(high##i##j, x, second);                                                                  \
        __asm__ volatile("" : "+v"(low##i##j), "+v"(high##i##j) : : "memory");                                                    \
    }
#define END(i, j)                                                                                                                 \
    _mm512_storeu_si512(sums + (3 * j + i) * OUT, low##i##j);                                                                     \
    _mm512_storeu_si512(sums + (3 * j + i) * OUT + OUT / 2, high##i##j);
    const __m512i below = _mm512_loadu_si512(start), above = _mm512_loadu_si512(start + OUT / 2);
    const uint8_t *row0 = inputs, *row1 = inputs + 3 * apart, *row2 = inputs + 6 * apart, *row3 = inputs + 9 * apart;
    FOR_TILES(BEGIN)
    for (int64_t at = 0; at < count; at++, weights += 4 * OUT) {
        __m512i first = _mm512_loadu_si512(weights), second = _mm512_loadu_si512(weights + 2 * OUT);
        __asm__ volatile("" : "+v"(first), "+v"(second) : : "memory");
        FOR_TILES(MULTIPLY)
        row0 += 4, row1 += 4, row2 += 4, row3 += 4;
    }
    FOR_TILES(END)
#undef BEGIN
#undef MULTIPLY
#undef END
}

/* Sums of one row, [OUT], as floats of a block's output channels from `channel` on. sum: of the row's codes less the zero point, of which
   what the weights lack is worth its multiple. */
static void write_row(const int32_t *sums, int32_t sum, int64_t channel, const Weights *weights, float scale, float *out) {
    for (int64_t c = channel; c < channel + OUT && c < weights->out; c += OUT / 2, sums += OUT / 2) {
        __mmask16 there = (__mmask16)(0xffff >> (OUT / 2 - least(OUT / 2, weights->out - c)));
        __m512i lacking = _mm512_mullo_epi32(_mm512_loadu_si512(weights->rest + c), _mm512_set1_epi32(sum));
        __m512 factor = _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_loadu_ps(weights->scale + c));
        __m512 value = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_loadu_si512(sums), lacking));
        _mm512_mask_storeu_ps(out + c, there, _mm512_fmadd_ps(value, factor, _mm512_loadu_ps(weights->bias + c)));
    }
}

/* codes, [count, channels], whole fours, and at least TILES of them -> out, [count, out]: `scale * weights.scale` times the sums of
   (code - zero_point) * (weight + rest), plus the bias. sums: of codes less the zero point, [count], or NULL where weights lack nothing. */
void multiply_rows(const uint8_t *codes, int64_t count, int64_t channels, Weights weights, float scale, int32_t zero_point,
                   const int32_t *sums, float *out, int32_t threads) {
    int64_t parts = (count + ROWS - 1) / ROWS, blocks = (weights.out + OUT - 1) / OUT;
#pragma omp parallel for schedule(static) num_threads(threads) if (count * channels * weights.out > ALONE)
    for (int64_t item = 0; item < parts * blocks; item++) { /* those that read the same rows follow each other */
        int64_t block = item % blocks, first = item / blocks * ROWS, last = least(first + ROWS, count);
        int32_t start[OUT], products[TILES * OUT];
        for (int c = 0; c < OUT; c++)
            start[c] = -zero_point * weights.sums[block * OUT + c];
        for (int64_t row = first; row < last; row += TILES) {
            int64_t from = least(row, count - TILES); /* some of the last ones twice */
            multiply(codes + from * channels, channels, weights.codes + block * channels * OUT, channels / 4, start, products);
            for (int64_t i = row; i < least(row + TILES, last); i++)
                write_row(products + (i - from) * OUT, sums ? sums[i] : 0, block * OUT, &weights, scale,
                          out + i * weights.out);
        }
    }
}

/* 2G g for three vectors. */
#define SPREAD_WEIGHTS(a, b, c, to, step)                                                                                         \
    {                                                                                                                             \
        __m512i ends = _mm512_add_epi8(a, c);                                                                                     \
        (to)[0] = _mm512_add_epi8(a, a), (to)[step] = _mm512_add_epi8(ends, b), (to)[2 * step] = _mm512_sub_epi8(ends, b);        \
        (to)[3 * step] = _mm512_add_epi8(c, c);                                                                                   \
    }

/* A block of weights, [KERNEL, count, OUT, 4] -> transformed ones, [PLACES, count, OUT, 4]. */
static void transform_weights(const int8_t *from, int64_t count, int8_t *to) {
    int64_t apart = count * 4 * OUT;
    for (int64_t at = 0; at < apart; at += BYTES) {
        __m512i half[12], done[PLACES];
        for (int j = 0; j < 3; j++) {
            __m512i g[3];
            for (int i = 0; i < 3; i++)
                g[i] = _mm512_loadu_si512(from + (3 * i + j) * apart + at);
            SPREAD_WEIGHTS(g[0], g[1], g[2], half + j, 3)
        }
        for (int i = 0; i < 4; i++)
            SPREAD_WEIGHTS(half[3 * i], half[3 * i + 1], half[3 * i + 2], done + 4 * i, 1)
        for (int place = 0; place < PLACES; place++)
            _mm512_storeu_si512(to + place * apart + at, done[place]);
    }
}

/* B'd for four vectors. */
#define SPREAD(a, b, c, d, to, step)                                                                                              \
    (to)[0] = _mm512_sub_epi8(a, c), (to)[step] = _mm512_add_epi8(b, c), (to)[2 * step] = _mm512_sub_epi8(c, b),                  \
    (to)[3 * step] = _mm512_sub_epi8(b, d)

/* One tile: pixels, each `channels` codes -> transformed inputs, PLACES of them, `apart` bytes from each other. */
static void transform(const uint8_t *const *pixels, int64_t channels, uint8_t *to, int64_t apart, int32_t top) {
    const __m512i more = _mm512_set1_epi8((char)(2 * top));
    for (int64_t c = 0; c < channels; c += BYTES) {
        int64_t count = least(BYTES, channels - c);
        __mmask64 there = ~0ULL >> (BYTES - count), whole = ~0ULL >> (BYTES - 4 * fours(count));
        __m512i half[PLACES], done[PLACES];
        for (int j = 0; j < 4; j++) {
            __m512i d[4];
            for (int i = 0; i < 4; i++)
                d[i] = _mm512_maskz_loadu_epi8(there, pixels[4 * i + j] + c);
            SPREAD(d[0], d[1], d[2], d[3], half + j, 4);
        }
        for (int i = 0; i < 4; i++)
            SPREAD(half[4 * i], half[4 * i + 1], half[4 * i + 2], half[4 * i + 3], done + 4 * i, 1);
        for (int place = 0; place < PLACES; place++)
            _mm512_mask_storeu_epi8(to + place * apart + c, whole,
                                    place == ALL ? done[place] : _mm512_add_epi8(done[place], more));
    }
}

typedef struct {
    int64_t image, row, column;
} Tile;

static Tile tile_at(int64_t index, Image image) {
    int64_t across = (image.width + 1) / 2, down = (image.height + 1) / 2;
    Tile tile = {index / across / down, index / across % down * 2, index % across * 2};
    return tile;
}

/* The pixels of a tile's input; those beside the image are `nothing`. */
static void find_pixels(Tile tile, Image image, const uint8_t *codes, const uint8_t *nothing, const uint8_t **pixels) {
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
            int64_t y = tile.row + i - 1, x = tile.column + j - 1;
            int inside = y >= 0 && y < image.height && x >= 0 && x < image.width;
            int64_t at = ((tile.image * image.height + y) * image.width + x) * image.channels;
            pixels[4 * i + j] = inside ? codes + at : nothing;
        }
}

/* A'm for four vectors. */
#define GATHER(a, b, c, d, to, step)                                                                                              \
    (to)[0] = _mm512_add_epi32(_mm512_add_epi32(a, b), c), (to)[step] = _mm512_sub_epi32(_mm512_sub_epi32(b, c), d)

/* Sums of one tile, PLACES of them, `apart` numbers from each other, as two by two pixels of a block's output channels. */
static void write_tile(const int32_t *sums, int64_t apart, Tile tile, Image image, const Weights *weights, int64_t channel, float scale,
                       float *out) {
    for (int64_t c = channel; c < channel + OUT && c < weights->out; c += OUT / 2, sums += OUT / 2) {
        __mmask16 there = (__mmask16)(0xffff >> (OUT / 2 - least(OUT / 2, weights->out - c)));
        __m512 factor = _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_loadu_ps(weights->scale + c));
        __m512 bias = _mm512_loadu_ps(weights->bias + c);
        __m512i half[8], done[4];
        for (int j = 0; j < 4; j++) {
            __m512i m[4];
            for (int i = 0; i < 4; i++)
                m[i] = _mm512_loadu_si512(sums + (4 * i + j) * apart);
            GATHER(m[0], m[1], m[2], m[3], half + j, 4);
        }
        for (int i = 0; i < 2; i++)
            GATHER(half[4 * i], half[4 * i + 1], half[4 * i + 2], half[4 * i + 3], done + 2 * i, 1);
        for (int64_t i = 0; i < 2 && tile.row + i < image.height; i++)
            for (int64_t j = 0; j < 2 && tile.column + j < image.width; j++) {
                int64_t pixel = (tile.image * image.height + tile.row + i) * image.width + tile.column + j;
                __m512 value = _mm512_cvtepi32_ps(_mm512_srai_epi32(done[2 * i + j], 2));
                _mm512_mask_storeu_ps(out + pixel * weights->out + c, there, _mm512_fmadd_ps(value, factor, bias));
            }
    }
}

/* What the sums of products begin at, [PLACES, OUT]. */
static void find_start(const int32_t *sums, int32_t top, int32_t zero_point, int32_t *start) {
    for (int place = 0; place < PLACES; place++)
        for (int c = 0; c < OUT; c++)
            start[place * OUT + c] = -(place == ALL ? 4 * zero_point : 2 * top) * sums[place * OUT + c];
}

/* Transformed inputs of tiles from `first` on, [groups, PLACES, TILES, 4 * fours]; those behind the last tile are the last again. */
static void transform_tiles(const uint8_t *codes, Image image, int64_t first, int64_t groups, const uint8_t *nothing, int32_t top,
                            uint8_t *to) {
    int64_t apart = 4 * fours(image.channels), last = tiles_of(image) - 1;
    for (int64_t i = 0; i < groups * TILES; i++) {
        const uint8_t *pixels[PLACES];
        find_pixels(tile_at(least(first + i, last), image), image, codes, nothing, pixels);
        transform(pixels, image.channels, to + (i / TILES * PLACES * TILES + i % TILES) * apart, TILES * apart, top);
    }
}

/* codes, 0 to top <= 63 -> out, [images, height, width, out]: `scale * weights.scale` times the sums of (code - zero_point) * weight over
   windows, plus the bias. space: `space_of` bytes. */
void convolve(const uint8_t *codes, Image image, Weights weights, float scale, int32_t zero_point, int32_t top, uint8_t *space, float *out,
              int32_t threads) {
    int64_t tiles = tiles_of(image), part = together(image.channels, tiles, threads), own = own_space(image.channels, part);
    int64_t count = fours(image.channels), apart = 4 * count, blocks = (weights.out + OUT - 1) / OUT;
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
            transform_weights(weights.codes + block * KERNEL * apart * OUT, count, made);
            find_start(weights.sums + block * PLACES * OUT, top, zero_point, start);
            for (int64_t tile = 0; tile < groups * TILES; tile += TILES) {
                for (int64_t place = 0; place < PLACES; place++)
                    multiply(inputs + (tile * PLACES + place * TILES) * apart, apart, made + place * apart * OUT, count,
                             start + place * OUT, sums + place * TILES * OUT);
                for (int64_t i = tile; i < tile + TILES && first + i < tiles; i++)
                    write_tile(sums + (i - tile) * OUT, TILES * OUT, tile_at(first + i, image), image, &weights, block * OUT, scale, out);
            }
        }
    }
}
#endif
