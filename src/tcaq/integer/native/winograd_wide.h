/* Convolutions of 3x3 pixels with numbers of up to nine bits, by Winograd's F(4x4, 3x3) (Lavin and Gray, CVPR 2016): four by four
   output pixels from six by six of the input by 36 products where there were 144. Transformed numbers are whole and fit 16 bits:

   - of inputs, less their zero point, sums with weights whose sizes add up to 100, of which no more than 68 pull one way.
   - of weights, sums by G with each row made whole, whose sizes add up to 49.

   Rows of G were multiplied by 4, -6, -6, 24, 24 and 1, which A' takes back as far as numbers stay whole: what is output row i and
   column j of a tile comes out 24, 12, 6 or 6 times those of i by those of j too large. Sums of products, and what is made of them, leave
   32 bits and come round, which is addition modulo 2^32: nothing is lost but what that factor has of powers of two, 2^6 at most. Nines are
   taken back by their inverse modulo 2^32, powers of two by a shift. So sums are exact as long as the true ones are below 2^25; where they
   may not be, channels are added up in chunks, for which they are.
   Liu and Mattina (Efficient residue number system based Winograd convolution, ECCV 2020) take several small moduli for larger forms.

   Whoever includes this has included `winograd.h`, said how many tiles are multiplied at once (WIDE_TILES) and how many bytes of
   transformed inputs and sums a thread makes at once (WIDE_NEAR), and has a `multiply_places` that multiplies them. */

#define WIDE_SIDE 4    /* output pixels of a tile */
#define WIDE_SPAN 6    /* input pixels */
#define WIDE_PLACES 36 /* transformed numbers */
#define WIDE_ENOUGH 96 /* tiles that products are made for at once, for which to transform weights takes a twentieth of that */
#define NINTH 0x38e38e39  /* times nine is one, modulo 2^32 */
#define UNROLLED _Pragma("GCC unroll 36") /* compilers leave loops over places as they are, and what they hold in memory */

typedef int16_t Halves __attribute__((vector_size(BYTES)));
typedef int8_t Narrow __attribute__((vector_size(BYTES / 2)));
typedef uint8_t NarrowCodes __attribute__((vector_size(BYTES / 2)));
#define HALVES (BYTES / 2) /* numbers of 16 bits in a vector */
#define LINE 32 /* of them in a line of the cache: what is written to many places at once lies a line further than powers of two */

/* codes: [blocks, twos, KERNEL, OUT, 2], what is no weight 0; rest: what each lacks, [blocks, OUT, 2]; for each output channel what makes
   floats of sums, [blocks * OUT]. chunks: of how many parts of channels, whole fours of `deep` but for the last, sums are made. */
typedef struct {
    const int8_t *codes;
    const int16_t *rest;
    const float *scale, *bias;
    int64_t out, chunks, deep;
} WideKernels;

/* Sums of products of `tiles` rows of inputs, whole groups of WIDE_TILES, `apart` numbers from each other, each of 2 * `twos`, with a block
   of weights, [twos, OUT, 2]; sums: [tiles, OUT]. twos: an even number. */
static void multiply_places(const int16_t *inputs, int64_t apart, int64_t tiles, const int16_t *weights, int64_t twos, int32_t *sums);

/* Channels with those that make up whole fours. */
static int64_t padded(int64_t channels) { return 4 * fours(channels); }

/* Tiles that a thread transforms before it multiplies them: whole groups of WIDE_TILES, as many of its share as are enough or near with their
   sums, all parts alike. */
static int64_t wide_together(int64_t channels, int64_t tiles, int64_t threads) {
    int64_t group = WIDE_PLACES * (2 * padded(channels) + 4 * OUT) * WIDE_TILES, near = least(WIDE_ENOUGH / WIDE_TILES, WIDE_NEAR / group);
    int64_t share = (tiles + threads * WIDE_TILES - 1) / (threads * WIDE_TILES), parts = near ? (share + near - 1) / near : share;
    return WIDE_TILES * ((share + parts - 1) / parts);
}

/* How far places are apart: of transformed weights of a block, and of transformed inputs. */
static int64_t weights_apart(int64_t channels) { return padded(channels) * OUT + LINE; }

static int64_t inputs_apart(int64_t channels, int64_t part) { return (padded(channels) * part + LINE - 1) / LINE * LINE + LINE; }

/* Bytes that a thread has for its own: these, and sums. */
static int64_t wide_own_space(int64_t channels, int64_t part, int64_t chunks) {
    return WIDE_PLACES * (2 * weights_apart(channels) + 2 * inputs_apart(channels, part) + chunks * part * OUT * 4);
}

/* Bytes that `convolve_wide_tiles` needs for its own. */
int64_t wide_space_of(Image image, int64_t chunks, int32_t threads) {
    int64_t part = wide_together(image.channels, tiles_of(image, WIDE_SIDE), threads);
    return threads * wide_own_space(image.channels, part, chunks) + image.channels;
}

/* Rows of G made whole, times three vectors. */
#define SPREAD_WIDE_WEIGHTS(a, b, c, to, step)                                                                                    \
    {                                                                                                                             \
        Halves ends = (a) + (c), far = (a) + 4 * (c);                                                                             \
        (to)[0] = (a), (to)[step] = ends + (b), (to)[2 * (step)] = ends - (b);                                                    \
        (to)[3 * (step)] = far + 2 * (b), (to)[4 * (step)] = far - 2 * (b), (to)[5 * (step)] = (c);                               \
    }

/* A block of weights, [twos, KERNEL, OUT, 2] -> transformed ones, WIDE_PLACES of [twos, OUT, 2], `apart` numbers from each other. */
static void transform_wide_weights(const int8_t *from, const int16_t *rest, int64_t twos, int16_t *to, int64_t apart) {
    for (int64_t two = 0; two < twos; two++, from += KERNEL * OUT * 2, to += OUT * 2)
        for (int64_t at = 0; at < OUT * 2; at += HALVES) {
            Halves half[18], done[WIDE_PLACES], more;
            memcpy(&more, rest + at, BYTES);
            UNROLLED for (int j = 0; j < 3; j++) {
                Halves g[3];
                UNROLLED for (int i = 0; i < 3; i++) {
                    Narrow codes;
                    memcpy(&codes, from + (3 * i + j) * OUT * 2 + at, HALVES);
                    g[i] = __builtin_convertvector(codes, Halves) + more;
                }
                SPREAD_WIDE_WEIGHTS(g[0], g[1], g[2], half + j, 3)
            }
            UNROLLED for (int i = 0; i < WIDE_SPAN; i++)
                SPREAD_WIDE_WEIGHTS(half[3 * i], half[3 * i + 1], half[3 * i + 2], done + WIDE_SPAN * i, 1)
            UNROLLED for (int place = 0; place < WIDE_PLACES; place++)
                memcpy(to + place * apart + at, &done[place], BYTES);
        }
}

/* B' times six vectors. */
#define SPREAD_WIDE(d, apart, to, step)                                                                                           \
    {                                                                                                                             \
        Halves even = (d)[4 * (apart)] - 4 * (d)[2 * (apart)], odd = (d)[3 * (apart)] - 4 * (d)[apart];                           \
        Halves near = (d)[4 * (apart)] - (d)[2 * (apart)], twice = 2 * ((d)[3 * (apart)] - (d)[apart]);                           \
        (to)[0] = 4 * (d)[0] + (d)[4 * (apart)] - 5 * (d)[2 * (apart)];                                                           \
        (to)[step] = even + odd, (to)[2 * (step)] = even - odd, (to)[3 * (step)] = near + twice, (to)[4 * (step)] = near - twice; \
        (to)[5 * (step)] = 4 * (d)[apart] + (d)[5 * (apart)] - 5 * (d)[3 * (apart)];                                              \
    }

/* `count` channels of a tile from `c` on: pixels, each channels of codes -> transformed inputs, WIDE_PLACES of them, `apart` numbers from
   each other. */
static inline __attribute__((always_inline)) void transform_wide(const uint8_t *const *pixels, int64_t c, int64_t count, int16_t *to, int64_t apart, int16_t zero_point) {
    Halves d[WIDE_PLACES], half[WIDE_PLACES], done[WIDE_PLACES];
    for (int pixel = 0; pixel < WIDE_PLACES; pixel++) {
        NarrowCodes codes = (NarrowCodes){0} + (uint8_t)zero_point; /* what makes up whole fours is 0 without it */
        memcpy(&codes, pixels[pixel] + c, count);
        d[pixel] = __builtin_convertvector(codes, Halves) - zero_point;
    }
    for (int j = 0; j < WIDE_SPAN; j++)
        SPREAD_WIDE(d + j, WIDE_SPAN, half + j, WIDE_SPAN)
    for (int i = 0; i < WIDE_SPAN; i++)
        SPREAD_WIDE(half + WIDE_SPAN * i, 1, done + WIDE_SPAN * i, 1)
    for (int place = 0; place < WIDE_PLACES; place++)
        memcpy(to + place * apart + c, &done[place], 2 * padded(count));
}

/* Transformed inputs of `part` tiles from `first` on, WIDE_PLACES of [part, padded channels], `apart` numbers from each other; those
   behind the last tile are the last again. */
static void transform_wide_tiles(const uint8_t *codes, Image image, int64_t first, int64_t part, const uint8_t *nothing,
                                 int16_t zero_point, int16_t *to, int64_t apart) {
    int64_t channels = padded(image.channels), last = tiles_of(image, WIDE_SIDE) - 1, whole = image.channels / HALVES * HALVES;
    for (int64_t i = 0; i < part; i++) {
        const uint8_t *pixels[WIDE_PLACES];
        find_pixels(tile_at(least(first + i, last), image, WIDE_SIDE), image, WIDE_SPAN, codes, nothing, pixels);
        for (int64_t c = 0; c < whole; c += HALVES)
            transform_wide(pixels, c, HALVES, to + i * channels, apart, zero_point);
        if (whole < image.channels)
            transform_wide(pixels, whole, image.channels - whole, to + i * channels, apart, zero_point);
    }
}

/* A' times six vectors, of which output 0 to 3 are 24, 12, 6 and 6 times what they stand for. */
#define GATHER_WIDE(m, apart, to, step)                                                                                           \
    {                                                                                                                             \
        Sums both = (m)[apart] + (m)[2 * (apart)], differ = (m)[apart] - (m)[2 * (apart)];                                        \
        Sums far = (m)[3 * (apart)] + (m)[4 * (apart)], unlike = (m)[3 * (apart)] - (m)[4 * (apart)];                             \
        (to)[0] = 6 * (m)[0] - 4 * both + far, (to)[step] = unlike - 2 * differ, (to)[2 * (step)] = far - both;                   \
        (to)[3 * (step)] = 6 * (m)[5 * (apart)] + 2 * unlike - differ;                                                            \
    }

/* Sums of one tile and one chunk, WIDE_PLACES of them, `apart` numbers from each other, as four by four pixels of some output channels. */
static inline __attribute__((always_inline)) void gather_wide(const int32_t *sums, int64_t apart, Signed *done) {
    static const int twos[WIDE_SIDE] = {3, 2, 1, 1}; /* powers of two in 24, 12, 6 and 6 */
    Sums m[WIDE_PLACES], half[WIDE_SIDE * WIDE_SPAN], whole[WIDE_SIDE * WIDE_SIDE];
    for (int place = 0; place < WIDE_PLACES; place++)
        m[place] = take_sums(sums + place * apart);
    for (int j = 0; j < WIDE_SPAN; j++)
        GATHER_WIDE(m + j, WIDE_SPAN, half + j, WIDE_SPAN)
    for (int i = 0; i < WIDE_SIDE; i++)
        GATHER_WIDE(half + WIDE_SPAN * i, 1, whole + WIDE_SIDE * i, 1)
    for (int i = 0; i < WIDE_SIDE * WIDE_SIDE; i++)
        done[i] = (Signed)(whole[i] * NINTH) >> (twos[i / WIDE_SIDE] + twos[i % WIDE_SIDE]);
}

/* Sums of one tile, [chunks, WIDE_PLACES, tiles, OUT], as four by four pixels of a block's output channels. */
static void write_wide_tile(const int32_t *sums, int64_t tiles, Tile tile, Image image, const WideKernels *kernels, int64_t channel,
                            float scale, float *out) {
    for (int64_t c = channel; c < channel + OUT && c < kernels->out; c += LANES, sums += LANES) {
        int64_t count = least(LANES, kernels->out - c);
        Signed done[WIDE_SIDE * WIDE_SIDE], more[WIDE_SIDE * WIDE_SIDE];
        Floats factor, bias;
        memcpy(&factor, kernels->scale + c, BYTES);
        memcpy(&bias, kernels->bias + c, BYTES);
        factor *= scale;
        gather_wide(sums, tiles * OUT, done);
        for (int64_t chunk = 1; chunk < kernels->chunks; chunk++) {
            gather_wide(sums + chunk * WIDE_PLACES * tiles * OUT, tiles * OUT, more);
            for (int i = 0; i < WIDE_SIDE * WIDE_SIDE; i++)
                done[i] += more[i];
        }
        for (int64_t i = 0; i < WIDE_SIDE && tile.row + i < image.height; i++)
            for (int64_t j = 0; j < WIDE_SIDE && tile.column + j < image.width; j++) {
                int64_t pixel = (tile.image * image.height + tile.row + i) * image.width + tile.column + j;
                Floats value = __builtin_convertvector(done[WIDE_SIDE * i + j], Floats) * factor + bias;
                if (count == LANES)
                    memcpy(out + pixel * kernels->out + c, &value, BYTES);
                else
                    memcpy(out + pixel * kernels->out + c, &value, 4 * count);
            }
    }
}

/* Sums of a block for the tiles of a part, [chunks, WIDE_PLACES, tiles, OUT]. */
static void multiply_wide_block(const int16_t *inputs, int64_t inputs_apart, int64_t tiles, const int16_t *weights, int64_t weights_apart,
                                int64_t channels, const WideKernels *kernels, int32_t *sums) {
    for (int64_t chunk = 0; chunk < kernels->chunks; chunk++)
        for (int64_t place = 0; place < WIDE_PLACES; place++, sums += tiles * OUT) {
            int64_t first = chunk * kernels->deep;
            multiply_places(inputs + place * inputs_apart + first, channels, tiles, weights + place * weights_apart + first * OUT,
                            least(kernels->deep, channels - first) / 2, sums);
        }
}

/* codes -> out, [images, height, width, out]: `scale * kernels.scale` times the sums of (code - zero_point) * (weight + rest) over windows,
   plus the bias. space: `wide_space_of` bytes, at a multiple of four. */
void convolve_wide_tiles(const uint8_t *codes, Image image, WideKernels kernels, float scale, int32_t zero_point, uint8_t *space, float *out,
                         int32_t threads) {
    int64_t tiles = tiles_of(image, WIDE_SIDE), part = wide_together(image.channels, tiles, threads), channels = padded(image.channels);
    int64_t own = wide_own_space(image.channels, part, kernels.chunks), blocks = (kernels.out + OUT - 1) / OUT;
    int64_t parts = (tiles + part - 1) / part, slices = least(blocks, (threads + parts - 1) / parts); /* few parts: blocks are shared */
    uint8_t *nothing = space + threads * own;
    memset(nothing, zero_point, image.channels);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t item = 0; item < parts * slices; item++) {
        int64_t first = item / slices * part, slice = item % slices, last = least(first + part, tiles);
        int64_t here = (last - first + WIDE_TILES - 1) / WIDE_TILES * WIDE_TILES;
        int64_t of_weights = weights_apart(image.channels), of_inputs = inputs_apart(image.channels, here);
        int16_t *made = (int16_t *)(space + omp_get_thread_num() * own), *inputs = made + WIDE_PLACES * of_weights;
        int32_t *sums = (int32_t *)(inputs + WIDE_PLACES * of_inputs);
        transform_wide_tiles(codes, image, first, here, nothing, (int16_t)zero_point, inputs, of_inputs);
        for (int64_t block = blocks * slice / slices; block < blocks * (slice + 1) / slices; block++) {
            const int8_t *weights = kernels.codes + block * KERNEL * channels * OUT;
            transform_wide_weights(weights, kernels.rest + block * OUT * 2, channels / 2, made, of_weights);
            multiply_wide_block(inputs, of_inputs, here, made, of_weights, channels, &kernels, sums);
            for (int64_t tile = first; tile < last; tile++)
                write_wide_tile(sums + (tile - first) * OUT, here, tile_at(tile, image, WIDE_SIDE), image, &kernels, block * OUT, scale, out);
        }
    }
}
