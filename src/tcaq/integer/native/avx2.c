/* Integer convolutions for x86 processors with AVX2 and without VNNI, which have no instruction that multiplies bytes and adds up in
   32 bits. Two others take its place:

   - for narrow numbers, maddubs multiplies bytes and adds two products in 16 bits. Their sums are added up there as long as they
     fit, and only then moved to 32 bits, where libraries that know nothing of the numbers move each.
   - for wide numbers, madd multiplies numbers of 16 bits and adds two products in 32.

   Inputs lie channels last: what a row of the kernel covers of an image is a run of numbers beside each other, `width * channels` of
   them, taken in fours; where the kernel's pixels are apart, what each of them covers is. A matrix product is a convolution of 1 by 1.

   Numbers of four bits have convolutions of 3x3 in Winograd's form, too. */

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
int32_t exists(void) { return 1; }
#else
int32_t exists(void) { return 0; }
#endif

/* Whether it is the best that there is here. */
int32_t helps(void) {
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
    return 0;
#else
    return exists();
#endif
}

#if defined(__AVX2__)
#include <immintrin.h>

#define BYTES 32  /* in a vector */
#define OUT 16    /* output channels of a block of weights: two vectors of sums */
#define PIXELS 6  /* multiplied with it at once: twelve vectors of sums, of the sixteen that a processor has */
#define TILES 12  /* whole PIXELS */
#define WIDE_TILES PIXELS
#define WIDE_NEAR 1310720 /* bytes of their inputs and sums */
#define SHARED 96 /* pixels for which a block is read, and made wide, once */
#define DEEP 512  /* fours of narrow weights for each output channel, as many of a block as stay in the first cache */
#define LONGEST 4096 /* numbers in a row of the left one of two matrices, for which there is room */
#define ALONE 16384  /* numbers that one thread has padded before another has begun */
#include "winograd.h"
#include "winograd_wide.h"

int32_t longest(void) { return LONGEST; }

/* Codes, [images, height, width, channels]. A kernel slides over them by `down` and `right`; the first place of its upper left corner
   is `top` above and `left` beside them, and there are rows by columns places. It has `runs` runs of `run` codes, `beside` of them
   in a row, and rows and runs are step_down and step_right pixels apart. */
typedef struct {
    int64_t images, height, width, channels, runs, beside, run, down, right, top, left, step_down, step_right, rows, columns;
} Window;

/* codes: [blocks, runs, fours, OUT, 4], what is no weight 0. For each output channel, [blocks * OUT]: the sum of its codes, a
   number that each code lacks, and what makes floats of sums. most: how often two products fit 16 bits; 0 if inputs are wide. */
typedef struct {
    const int8_t *codes;
    const int32_t *sums, *rest;
    const float *scale, *bias;
    int64_t out, most;
} Weights;

/* The runs that are multiplied with a part of a block: where they begin in a window, and how many fours of each. */
typedef struct {
    const int64_t *starts;
    int64_t runs, fours;
} Part;

static inline __m256i repeat_four(const void *bytes) {
    int32_t four;
    memcpy(&four, bytes, sizeof four);
    return _mm256_set1_epi32(four);
}

static inline __m256i load(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }

static inline void add_to(int32_t *sums, __m256i more) {
    _mm256_storeu_si256((__m256i *)sums, _mm256_add_epi32(load(sums), more));
}

/* Sums stay in registers, two for each pixel. Compilers that may load all inputs first, or weights again for each pixel, do, and find
   no register for the sums then: an empty statement that changes them is in the way. */
#define FOR_PIXELS(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
#define BEGIN(i) __m256i low##i = _mm256_setzero_si256(), high##i = _mm256_setzero_si256();
#define STAY(a, b) __asm__ volatile("" : "+x"(a), "+x"(b) : : "memory");
#define ADD(i)                                                                                                                    \
    add_to(sums + i * OUT, low##i);                                                                                               \
    add_to(sums + i * OUT + 8, high##i);
#define ADD_PAIRS(i)                                                                                                              \
    add_to(sums + i * OUT, _mm256_madd_epi16(low##i, _mm256_set1_epi16(1)));                                                      \
    add_to(sums + i * OUT + 8, _mm256_madd_epi16(high##i, _mm256_set1_epi16(1)));                                                 \
    low##i = high##i = _mm256_setzero_si256();

/* Add to sums, [PIXELS, OUT], the products of a part of a block with pixels of bytes. */
static __attribute__((noinline)) void multiply_narrow(const uint8_t *const *pixels, const int8_t *weights, Part part, int64_t most,
                                                      int32_t *sums) {
#define POINT(i) const uint8_t *x##i = pixels[i] + part.starts[run];
#define MULTIPLY(i)                                                                                                               \
    {                                                                                                                             \
        __m256i x = repeat_four(x##i + 4 * at);                                                                                   \
        low##i = _mm256_add_epi16(low##i, _mm256_maddubs_epi16(x, first));                                                        \
        high##i = _mm256_add_epi16(high##i, _mm256_maddubs_epi16(x, second));                                                     \
        STAY(low##i, high##i)                                                                                                     \
    }
    FOR_PIXELS(BEGIN)
    int64_t left = most;
    for (int64_t run = 0; run < part.runs; run++) {
        FOR_PIXELS(POINT)
        for (int64_t at = 0; at < part.fours;) {
            if (!left) {
                FOR_PIXELS(ADD_PAIRS)
                left = most;
            }
            int64_t end = part.fours - at < left ? part.fours : at + left;
            for (left -= end - at; at < end; at++, weights += 4 * OUT) {
                __m256i first = load(weights), second = load(weights + 32);
                STAY(first, second)
                FOR_PIXELS(MULTIPLY)
            }
        }
    }
    FOR_PIXELS(ADD_PAIRS)
#undef POINT
#undef MULTIPLY
}

static void multiply_tiles(const uint8_t *inputs, int64_t apart, const int8_t *weights, int64_t count, const int32_t *start, int64_t most,
                           int32_t *sums) {
    static const int64_t begin = 0;
    Part part = {&begin, 1, count};
    for (int64_t tile = 0; tile < TILES; tile += PIXELS) {
        const uint8_t *pixels[PIXELS];
        for (int64_t i = 0; i < PIXELS; i++) {
            pixels[i] = inputs + (tile + i) * apart;
            memcpy(sums + (tile + i) * OUT, start, OUT * sizeof *start);
        }
        multiply_narrow(pixels, weights, part, most, sums + tile * OUT);
    }
}

/* The same of numbers of 16 bits; weights: in halves of fours, [2 * fours, OUT, 2]. */
static __attribute__((noinline)) void multiply_wide(const int16_t *const *pixels, const int16_t *weights, Part part, int32_t *sums) {
#define POINT(i) const int16_t *x##i = pixels[i] + part.starts[run];
#define MULTIPLY(i)                                                                                                               \
    {                                                                                                                             \
        __m256i x = repeat_four(x##i + 2 * at);                                                                                   \
        low##i = _mm256_add_epi32(low##i, _mm256_madd_epi16(x, first));                                                           \
        high##i = _mm256_add_epi32(high##i, _mm256_madd_epi16(x, second));                                                        \
        STAY(low##i, high##i)                                                                                                     \
    }
    FOR_PIXELS(BEGIN)
    for (int64_t run = 0; run < part.runs; run++) {
        FOR_PIXELS(POINT)
        for (int64_t at = 0; at < 2 * part.fours; at++, weights += 2 * OUT) {
            __m256i first = load(weights), second = load(weights + 16);
            STAY(first, second)
            FOR_PIXELS(MULTIPLY)
        }
    }
    FOR_PIXELS(ADD)
#undef POINT
#undef MULTIPLY
}

static void multiply_places(const int16_t *inputs, int64_t apart, int64_t tiles, const int16_t *weights, int64_t twos, int32_t *sums) {
    static const int64_t begin = 0;
    Part part = {&begin, 1, twos / 2};
    memset(sums, 0, tiles * OUT * sizeof *sums);
    for (int64_t tile = 0; tile < tiles; tile += PIXELS) {
        const int16_t *pixels[PIXELS];
        for (int64_t i = 0; i < PIXELS; i++)
            pixels[i] = inputs + (tile + i) * apart;
        multiply_wide(pixels, weights, part, sums + tile * OUT);
    }
}

/* Weights of 16 bits in halves of fours, each with what it lacks. */
static void widen(const int8_t *from, int64_t fours, const int32_t *rest, int16_t *to) {
    for (int64_t at = 0; at < fours; at++, from += 4 * OUT, to += 4 * OUT)
        for (int side = 0; side < 2; side++) { /* eight output channels */
            __m256i more = load(rest + 8 * side);
            more = _mm256_or_si256(_mm256_slli_epi32(more, 16), _mm256_and_si256(more, _mm256_set1_epi32(0xffff)));
            __m256 a = _mm256_castsi256_ps(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(from + 32 * side))));
            __m256 b = _mm256_castsi256_ps(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(from + 32 * side + 16))));
            __m256i even = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)), 0xd8);
            __m256i odd = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd)), 0xd8);
            _mm256_storeu_si256((__m256i *)(to + 16 * side), _mm256_add_epi16(even, more));
            _mm256_storeu_si256((__m256i *)(to + 2 * OUT + 16 * side), _mm256_add_epi16(odd, more));
        }
}

/* What is behind the last number of a run is no weight, and lacks nothing; to: the last four of the run. */
static void drop(int16_t *to, int64_t kept) {
    for (int64_t number = kept; number < 4; number++)
        for (int64_t channel = 0; channel < OUT; channel++)
            to[(number / 2 * OUT + channel) * 2 + number % 2] = 0;
}

/* One row of an image, [width, channels], with what is beside it; a NULL row is all beside. Wide numbers lose the zero point, so that
   nothing is 0. */
static void pad_narrow(const uint8_t *row, uint8_t *to, int64_t count, int64_t beside, int32_t zero_point) {
    memset(to, zero_point, count + 2 * beside);
    if (row)
        memcpy(to + beside, row, count);
}

static void pad_wide(const uint8_t *row, int16_t *to, int64_t count, int64_t beside, int32_t zero_point) {
    memset(to, 0, (count + 2 * beside) * sizeof *to);
    if (row)
        for (int64_t i = 0; i < count; i++)
            to[beside + i] = (int16_t)(row[i] - zero_point);
}

static void pad(const uint8_t *codes, void *to, int wide, Window window, int32_t zero_point, int32_t threads) {
    int64_t height = window.height + 2 * window.top, beside = window.left * window.channels, count = window.width * window.channels;
#pragma omp parallel for num_threads(threads) if (window.images * height * count > ALONE)
    for (int64_t line = 0; line < window.images * height; line++) {
        int64_t y = line % height - window.top, first = line * (count + 2 * beside);
        const uint8_t *row = y < 0 || y >= window.height ? 0 : codes + (line / height * window.height + y) * count;
        if (wide)
            pad_wide(row, (int16_t *)to + first, count, beside, zero_point);
        else
            pad_narrow(row, (uint8_t *)to + first, count, beside, zero_point);
    }
}

/* Where the windows of SHARED output pixels begin among padded inputs; those behind the last are the last again. */
static void find_windows(int64_t first, const Window *window, int64_t *from) {
    int64_t tall = window->height + 2 * window->top, broad = window->width + 2 * window->left;
    int64_t column = first % window->columns, row = first / window->columns % window->rows;
    int64_t image = first / window->columns / window->rows;
    for (int64_t i = 0; i < SHARED; i++) {
        if (image < window->images)
            from[i] = ((image * tall + row * window->down) * broad + column * window->right) * window->channels;
        else
            from[i] = from[i - 1];
        if (++column == window->columns) {
            column = 0;
            if (++row == window->rows) {
                row = 0;
                image++;
            }
        }
    }
}

/* Where a run of the kernel begins in a window of padded inputs. */
static int64_t run_start(int64_t run, const Window *window) {
    int64_t row = run / window->beside, column = run % window->beside;
    return (row * window->step_down * (window->width + 2 * window->left) + column * window->step_right) * window->channels;
}

/* Sums of one block of weights for SHARED pixels, part by part: `runs` runs, or `cut` fours of one that is longer. */
static void multiply_block(const void *inputs, Window window, const Weights *weights, int64_t block, int64_t first, int32_t *sums) {
    int64_t fours = (window.run + 3) / 4, pixels = window.images * window.rows * window.columns;
    int64_t wide = weights->most == 0, deep = DEEP / (1 + wide), cut = least(fours, deep), runs = deep / cut;
    const int8_t *codes = weights->codes + block * window.runs * fours * 4 * OUT;
    const uint8_t *narrow_pixels[SHARED];
    const int16_t *wide_pixels[SHARED];
    int16_t made[DEEP / 2 * 4 * OUT];
    int64_t from[SHARED];
    find_windows(first, &window, from);
    for (int64_t i = 0; i < SHARED; i++) {
        narrow_pixels[i] = (const uint8_t *)inputs + from[i];
        wide_pixels[i] = (const int16_t *)inputs + from[i];
    }
    for (int64_t run = 0; run < window.runs; run += runs)
        for (int64_t at = 0; at < fours; at += cut) {
            int64_t starts[DEEP];
            Part part = {starts, least(runs, window.runs - run), least(cut, fours - at)};
            for (int64_t i = 0; i < part.runs; i++)
                starts[i] = run_start(run + i, &window) + 4 * at;
            const int8_t *own = codes + (run * fours + at) * 4 * OUT;
            if (wide) {
                widen(own, part.runs * part.fours, weights->rest + block * OUT, made);
                for (int64_t i = 1; i <= part.runs && at + cut >= fours; i++)
                    drop(made + (i * part.fours - 1) * 4 * OUT, window.run - 4 * (fours - 1));
            }
            for (int64_t i = 0; i < SHARED && first + i < pixels; i += PIXELS)
                if (wide)
                    multiply_wide(wide_pixels + i, made, part, sums + i * OUT);
                else
                    multiply_narrow(narrow_pixels + i, own, part, weights->most, sums + i * OUT);
        }
}

static void scale_sums(const int32_t *sums, float *out, const Weights *weights, int64_t from, float scale, int32_t zero_point) {
    int64_t count = least(OUT, weights->out - from);
    const int32_t *own = weights->sums + from;
    for (int64_t c = 0; c < count; c++)
        out[c] = (float)(sums[c] - zero_point * own[c]) * (scale * weights->scale[from + c]) + weights->bias[from + c];
}

/* codes -> out, [images, rows, columns, out]: `scale * weights.scale` times the sums of (code - zero_point) * weight over windows, plus
   the bias. space: for padded inputs, [images, height + 2 top, width + 2 left, channels] and three numbers more, of as many bytes
   as are multiplied; NULL where nothing is beside them, their run is whole fours, and they are narrow. */
void convolve(const uint8_t *codes, Window window, Weights weights, float scale, int32_t zero_point, void *space, float *out,
              int32_t threads) {
    int64_t pixels = window.images * window.rows * window.columns, parts = (pixels + SHARED - 1) / SHARED;
    int64_t blocks = (weights.out + OUT - 1) / OUT;
    int wide = weights.most == 0;
    if (space)
        pad(codes, space, wide, window, zero_point, threads);
    const void *inputs = space ? space : codes;
    if (wide)
        zero_point = 0; /* it is off them */
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t item = 0; item < parts * blocks; item++) { /* those that read the same inputs follow each other */
        int64_t block = item % blocks, first = item / blocks * SHARED;
        int32_t sums[SHARED * OUT] = {0};
        multiply_block(inputs, window, &weights, block, first, sums);
        for (int64_t i = 0; i < least(SHARED, pixels - first); i++)
            scale_sums(sums + i * OUT, out + (first + i) * weights.out + block * OUT, &weights, block * OUT, scale, zero_point);
    }
}

/* Matrices: left, [count, rows, inner], by rows; right, [count, inner, columns], whose numbers are `down` apart in a column and `beside`
   in a row, its matrices inner * columns. */
typedef struct {
    int64_t count, rows, inner, columns, down, beside;
} Matrices;

/* OUT columns of a right matrix, from `first` on, as a block of weights; what is none is 0. to: [fours, OUT, 4]. */
static void take_columns(const int8_t *right, const Matrices *sizes, int64_t first, int8_t *to) {
    int64_t count = least(OUT, sizes->columns - first), whole = sizes->inner / 4 * 4;
    memset(to, 0, (sizes->inner + 3) / 4 * 4 * OUT);
    for (int64_t at = 0; at < sizes->inner; at += 4) {
        const int8_t *from = right + at * sizes->down + first * sizes->beside;
        if (sizes->down == 1 && at < whole)
            for (int64_t column = 0; column < count; column++)
                memcpy(to + at * OUT + column * 4, from + column * sizes->beside, 4);
        else
            for (int64_t number = 0; number < least(4, sizes->inner - at); number++)
                for (int64_t column = 0; column < count; column++)
                    to[at * OUT + column * 4 + number] = from[number * sizes->down + column * sizes->beside];
    }
}

/* (left @ right + row + column) * scale; left: numbers of 16 bits, three more behind them; row: [count, rows], column: [count,
   columns], or NULL. */
void multiply(const int16_t *left, const int8_t *right, Matrices sizes, const int32_t *row, const int32_t *column, float scale, float *out,
              int32_t threads) {
    static const int32_t nothing[OUT] = {0};
    int64_t blocks = (sizes.columns + OUT - 1) / OUT, start = 0;
    Part part = {&start, 1, (sizes.inner + 3) / 4};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t item = 0; item < sizes.count * blocks; item++) {
        int64_t matrix = item / blocks, first = item % blocks * OUT, count = least(OUT, sizes.columns - first);
        int8_t taken[LONGEST * OUT];
        int16_t made[LONGEST * OUT];
        take_columns(right + matrix * sizes.inner * sizes.columns, &sizes, first, taken);
        widen(taken, part.fours, nothing, made);
        for (int64_t tile = 0; tile < sizes.rows; tile += PIXELS) {
            int32_t sums[PIXELS * OUT] = {0};
            const int16_t *pixels[PIXELS];
            for (int64_t i = 0; i < PIXELS; i++)
                pixels[i] = left + (matrix * sizes.rows + least(tile + i, sizes.rows - 1)) * sizes.inner;
            multiply_wide(pixels, made, part, sums);
            for (int64_t i = 0; i < least(PIXELS, sizes.rows - tile); i++) {
                int64_t own = matrix * sizes.rows + tile + i;
                int32_t more = row ? row[own] : 0;
                for (int64_t c = 0; c < count; c++) {
                    int32_t above = column ? column[matrix * sizes.columns + first + c] : 0;
                    out[own * sizes.columns + first + c] = (float)(sums[i * OUT + c] + more + above) * scale;
                }
            }
        }
    }
}
#endif
