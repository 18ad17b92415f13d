/* Products of bytes on x86 processors with AVX-512 VNNI, where a call of oneDNN costs more than small ones of them, or narrow numbers
   need fewer than it makes: rows of codes times weights, and convolutions in Winograd's form. */

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

#define BYTES 64 /* in a vector */
#define OUT 32   /* output channels of a block of weights: two vectors of sums */
#define TILES 12 /* multiplied with it at once: 24 vectors of sums, of the 32 that a processor has */
#define ROWS 96  /* of a matrix for which a block of weights is read once: whole TILES */
#define ALONE 2097152 /* products that one thread has made before another has begun */
#define WIDE_TILES 6 /* the same for numbers of 16 bits: twelve vectors of sums, as few tiles as keep the processor busy */
#define WIDE_NEAR 1572864 /* bytes of their inputs and sums: less stays in the second cache, and has weights transformed for few of them */
#include "winograd.h"
#include "winograd_wide.h"

static inline __m512i repeat_four(const void *bytes) {
    int32_t four;
    memcpy(&four, bytes, sizeof four);
    return _mm512_set1_epi32(four);
}

static __attribute__((noinline)) void multiply_tiles(const uint8_t *inputs, int64_t apart, const int8_t *weights, int64_t count,
                                                     const int32_t *start, int64_t most, int32_t *sums) {
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
    (void)most; /* sums have 32 bits */
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

static __attribute__((noinline)) void multiply_places(const int16_t *inputs, int64_t apart, int64_t tiles, const int16_t *weights,
                                                      int64_t twos, int32_t *sums) {
#define FOR_ROWS(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
#define BEGIN(i) __m512i low##i = _mm512_setzero_si512(), high##i = _mm512_setzero_si512();
#define MULTIPLY(i)                                                                                                               \
    {                                                                                                                             \
        __m512i x = repeat_four(row + i * apart + 2 * at);                                                                        \
        low##i = _mm512_dpwssd_epi32(low##i, x, first);                                                                           \
        high##i = _mm512_dpwssd_epi32(high##i, x, second);                                                                        \
        __asm__ volatile("" : "+v"(low##i), "+v"(high##i) : : "memory");                                                          \
    }
#define END(i)                                                                                                                    \
    _mm512_storeu_si512(sums + i * OUT, low##i);                                                                                  \
    _mm512_storeu_si512(sums + i * OUT + OUT / 2, high##i);
    for (int64_t tile = 0; tile < tiles; tile += WIDE_TILES, sums += WIDE_TILES * OUT) {
        const int16_t *row = inputs + tile * apart;
        FOR_ROWS(BEGIN)
        for (int64_t at = 0; at < twos; at++) {
            __m512i first = _mm512_loadu_si512(weights + at * 2 * OUT), second = _mm512_loadu_si512(weights + at * 2 * OUT + OUT);
            __asm__ volatile("" : "+v"(first), "+v"(second) : : "memory");
            FOR_ROWS(MULTIPLY)
        }
        FOR_ROWS(END)
    }
#undef BEGIN
#undef MULTIPLY
#undef END
}

/* codes: [blocks, fours, OUT, 4], what is no weight 0; for each output channel, [blocks * OUT]: the sum of its codes, a number that each
   code lacks, and what makes floats of sums. */
typedef struct {
    const int8_t *codes;
    const int32_t *sums, *rest;
    const float *scale, *bias;
    int64_t out;
} Matrix;

/* Sums of one row, [OUT], as floats of a block's output channels from `channel` on. sum: of the row's codes less the zero point, of which
   what the weights lack is worth its multiple. */
static void write_row(const int32_t *sums, int32_t sum, int64_t channel, const Matrix *weights, float scale, float *out) {
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
void multiply_rows(const uint8_t *codes, int64_t count, int64_t channels, Matrix weights, float scale, int32_t zero_point,
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
            multiply_tiles(codes + from * channels, channels, weights.codes + block * channels * OUT, channels / 4, start, 0, products);
            for (int64_t i = row; i < least(row + TILES, last); i++)
                write_row(products + (i - from) * OUT, sums ? sums[i] : 0, block * OUT, &weights, scale, out + i * weights.out);
        }
    }
}
#endif
