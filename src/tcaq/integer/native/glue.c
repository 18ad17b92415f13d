/* What stands between integer kernels, each in one pass over an activation whose channels lie beside each other.

   Written for a compiler's vectorizer: plain loops. Where they put out bytes, a vector holds 64 of them, so that what differs by
   channel is tabled for several pixels at once: for `repeats(channels)`, which make whole vectors. Divisions are divisions, and
   whole numbers come from rintf, which rounds halves to even, as PyTorch does. Threads are as many as PyTorch has. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define ALONE 16384 /* values that one thread is done with before another has begun */

/* How inputs become codes, `clamp(round(x / (scale * equalizer)) + zero_point, low, top)`; equalizer: [channels], or NULL. */
typedef struct {
    const float *equalizer;
    float scale, zero_point, low, top;
} Grid;

/* A group norm; weight, bias: [channels]; added: [images, channels], what each pixel is given before, or NULL. */
typedef struct {
    const float *weight, *bias, *added;
    int64_t groups;
    double eps;
} Norm;

/* How a window slides over an image of height by width. */
typedef struct {
    int64_t height, width, kernel_height, kernel_width, down, right, top, left, step_down, step_right;
} Window;

static inline int32_t code(float units, Grid grid) {
    float code = rintf(units) + grid.zero_point;
    code = code < grid.low ? grid.low : code;
    code = code > grid.top ? grid.top : code;
    return (int32_t)code;
}

/* 2^twos e^rest to about one unit in the last place (Cephes' polynomial). Args: twos: whole, -126 to 127; rest: at most half of log 2. */
static inline float power_of(float twos, float rest) {
    float power = 1.9875691500e-4f;
    power = power * rest + 1.3981999507e-3f;
    power = power * rest + 8.3334519073e-3f;
    power = power * rest + 4.1665795894e-2f;
    power = power * rest + 1.6666665459e-1f;
    power = power * rest + 5.0000001201e-1f;
    power = power * rest * rest + rest + 1.0f;
    int32_t bits = ((int32_t)twos + 127) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return power * scale;
}

/* e^x for x in what float32 can hold; beyond, what is next to it. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float twos = rintf(x * 1.44269504088896341f);
    return power_of(twos, x - twos * 0.693359375f + twos * 2.12194440e-4f);
}

/* As many pixels as their values make whole vectors of bytes; one where pixels are so wide that what is left over costs nothing. */
int64_t repeats(int64_t channels) {
    int64_t pixels = 1;
    while (channels < 512 && pixels * channels % 64)
        pixels *= 2;
    return pixels;
}

/* table: [pixels, channels], the divisors of each pixel. */
static void table_divisors(float *table, int64_t pixels, int64_t channels, const Grid *grid) {
    for (int64_t i = 0; i < pixels * channels; i++)
        table[i] = grid->equalizer ? grid->scale * grid->equalizer[i % channels] : grid->scale;
}

/* Codes of count values. The grid by value: bytes may alias all that is behind a pointer, and what may change is read again. */
static void encode_values(const float *restrict x, const float *restrict divisors, uint8_t *restrict codes, int64_t count,
                          Grid grid) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++)
        codes[i] = (uint8_t)code(x[i] / divisors[i], grid);
}

/* The same of silu(x * factors + shifts). */
static void encode_normed_values(const float *restrict x, const float *restrict factors, const float *restrict shifts,
                                 const float *restrict divisors, uint8_t *restrict codes, int64_t count, Grid grid) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        float y = x[i] * factors[i] + shifts[i];
        codes[i] = (uint8_t)code(y / ((1.0f + exponential(-y)) * divisors[i]), grid);
    }
}

/* sums: [pixels], of their codes, [pixels, channels]. */
static void sum_codes(const uint8_t *codes, int32_t *sums, int64_t pixels, int64_t channels) {
    for (int64_t pixel = 0; pixel < pixels; pixel++, codes += channels) {
        int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < channels; c++)
            sum += codes[c];
        sums[pixel] = sum;
    }
}

/* x: [pixels, channels] -> codes of the same shape, in bytes that hold negative ones as two's complement, and their sums, [pixels],
   where sums is not NULL; space: [repeats(channels), channels], overwritten. */
void encode(const float *x, uint8_t *codes, int32_t *sums, int64_t pixels, int64_t channels, Grid grid, float *space,
            int32_t threads) {
    int64_t step = repeats(channels);
    table_divisors(space, step, channels, &grid);
#pragma omp parallel for num_threads(threads) if (pixels * channels > ALONE)
    for (int64_t first = 0; first < pixels; first += step) {
        int64_t count = step < pixels - first ? step : pixels - first, from = first * channels;
        encode_values(x + from, space, codes + from, count * channels, grid);
        if (sums)
            sum_codes(codes + from, sums + first, count, channels);
    }
}

/* The sum of sums, [height, width], over the window of the output pixel at row, column, less `absent` for each pixel inside. */
static int32_t window_sum(const int32_t *sums, int64_t row, int64_t column, const Window *window, int32_t absent) {
    int32_t total = 0;
    for (int64_t i = 0; i < window->kernel_height; i++) {
        int64_t y = row * window->down + i * window->step_down - window->top;
        if (y < 0 || y >= window->height)
            continue;
        for (int64_t j = 0; j < window->kernel_width; j++) {
            int64_t x = column * window->right + j * window->step_right - window->left;
            if (x >= 0 && x < window->width)
                total += sums[y * window->width + x] - absent;
        }
    }
    return total;
}

/* out, [images, rows, columns, channels], += factors, [channels], times what each window sums up of sums, [images, height, width].
   A window's sum lacks `absent` for each pixel of it that is inside. */
void add_windows(float *out, const int32_t *sums, const float *factors, int64_t images, int64_t rows, int64_t columns,
                 int64_t channels, Window window, int32_t absent, int32_t threads) {
    int64_t pixels = rows * columns;
#pragma omp parallel for num_threads(threads) if (images * pixels * channels > ALONE)
    for (int64_t pixel = 0; pixel < images * pixels; pixel++) {
        const int32_t *own = sums + pixel / pixels * window.height * window.width;
        float sum = (float)window_sum(own, pixel % pixels / columns, pixel % columns, &window, absent);
        float *restrict to = out + pixel * channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; c++)
            to[c] += sum * factors[c];
    }
}

/* Sums of channels and of their squares over rows; sums: [2, channels], in double: what a group far from zero varies by is the
   small difference of large squares. */
static void add_up(const float *restrict x, int64_t rows, int64_t channels, double *restrict sums) {
    double *restrict squares = sums + channels;
    memset(sums, 0, 2 * channels * sizeof *sums);
    for (int64_t row = 0; row < rows; row++, x += channels) {
#pragma omp simd
        for (int64_t c = 0; c < channels; c++) {
            double value = x[c];
            sums[c] += value;
            squares[c] += value * value;
        }
    }
}

/* The norm of one image as `x * factor + shift`, from the sums of its parts, [parts, 2, channels]; affine: [2, repeats, channels].
   What was added to each pixel, a, is in neither: sum(x + a) = sum(x) + n a, and likewise for the squares. */
static void fold(const double *sums, int64_t parts, int64_t pixels, int64_t channels, const Norm *norm, const float *added,
                 float *affine) {
    int64_t each = channels / norm->groups, width = repeats(channels) * channels;
    for (int64_t first = 0; first < channels; first += each) {
        double sum = 0, square = 0;
        for (int64_t c = first; c < first + each; c++) {
            double own = 0, squares = 0, more = added ? added[c] : 0;
            for (int64_t part = 0; part < parts; part++) {
                own += sums[(2 * part) * channels + c];
                squares += sums[(2 * part + 1) * channels + c];
            }
            sum += own + pixels * more;
            square += squares + 2 * more * own + pixels * more * more;
        }
        double count = (double)pixels * each, mean = sum / count, variance = square / count - mean * mean;
        double inverse = 1 / sqrt((variance > 0 ? variance : 0) + norm->eps);
        for (int64_t c = first; c < first + each; c++) {
            double factor = inverse * norm->weight[c], more = added ? added[c] : 0;
            for (int64_t i = c; i < width; i += channels) {
                affine[i] = (float)factor;
                affine[width + i] = (float)(norm->bias[c] + (more - mean) * factor);
            }
        }
    }
}

/* Group norm, SiLU, then as `encode`; x: [images, pixels, channels]. Overwritten: moments, of each part, [images, parts, 2,
   channels]; space: factors and shifts of each image and the divisors, [(2 * images + 1) * repeats(channels), channels]. */
void encode_normed(const float *x, uint8_t *codes, int32_t *sums, int64_t images, int64_t pixels, int64_t channels, Norm norm,
                   Grid grid, double *moments, float *space, int64_t parts, int32_t threads) {
    int64_t each = (pixels + parts - 1) / parts, pair = 2 * channels, step = repeats(channels), width = step * channels;
    int64_t blocks = (pixels + step - 1) / step;
    float *affine = space, *divisors = affine + images * 2 * width;
    table_divisors(divisors, step, channels, &grid);
#pragma omp parallel num_threads(threads) if (images * pixels * channels > ALONE)
    {
#pragma omp for
        for (int64_t part = 0; part < images * parts; part++) {
            int64_t first = part % parts * each, last = first + each < pixels ? first + each : pixels;
            add_up(x + (part / parts * pixels + first) * channels, last - first, channels, moments + part * pair);
        }
#pragma omp for
        for (int64_t image = 0; image < images; image++)
            fold(moments + image * parts * pair, parts, pixels, channels, &norm, norm.added ? norm.added + image * channels : 0,
                 affine + image * 2 * width);
#pragma omp for
        for (int64_t block = 0; block < images * blocks; block++) {
            int64_t image = block / blocks, first = block % blocks * step;
            int64_t count = step < pixels - first ? step : pixels - first, from = (image * pixels + first) * channels;
            const float *factors = affine + image * 2 * width;
            encode_normed_values(x + from, factors, factors + width, divisors, codes + from, count * channels, grid);
            if (sums)
                sum_codes(codes + from, sums + image * pixels + first, count, channels);
        }
    }
}

/* (sums + row + column) * scale, of one matrix; row: [rows], column: [columns], each may be NULL. */
void scale_sums(const int32_t *sums, const int32_t *row, const int32_t *column, float *out, int64_t rows, int64_t columns,
                float scale, int32_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * columns > ALONE)
    for (int64_t i = 0; i < rows; i++) {
        const int32_t *restrict from = sums + i * columns;
        float *restrict to = out + i * columns;
        int32_t more = row ? row[i] : 0;
        if (column)
#pragma omp simd
            for (int64_t j = 0; j < columns; j++)
                to[j] = (float)(from[j] + more + column[j]) * scale;
        else
#pragma omp simd
            for (int64_t j = 0; j < columns; j++)
                to[j] = (float)(from[j] + more) * scale;
    }
}

/* log2 to about one unit in the last place (Cephes' polynomial) of floats from the smallest normal one on. */
static inline float binary_logarithm(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    int32_t octave = (bits - 0x3f3504f3) >> 23; /* so that what is left is between the roots of 1/2 and 2 */
    bits -= octave * (1 << 23);
    float f;
    memcpy(&f, &bits, sizeof f);
    f -= 1.0f;
    float power = 7.0376836292e-2f;
    power = power * f - 1.1514610310e-1f;
    power = power * f + 1.1676998740e-1f;
    power = power * f - 1.2420140846e-1f;
    power = power * f + 1.4249322787e-1f;
    power = power * f - 1.6668057665e-1f;
    power = power * f + 2.0000714765e-1f;
    power = power * f - 2.4999993993e-1f;
    power = power * f + 3.3333331174e-1f;
    return (float)octave + (f - 0.5f * f * f + power * f * f * f) * 1.44269504088896341f;
}

/* p: [count], at least 0 -> values[clamp(round(-per_octave * log2(p / peak)), 0, last)]; below 2^-126, where floats are no longer
   normal, all are 0. */
void fake_log2(const float *p, float *out, int64_t count, float peak, float per_octave, float last, const float *values,
               int32_t threads) {
#pragma omp parallel for simd num_threads(threads) if (parallel : count > ALONE)
    for (int64_t i = 0; i < count; i++) {
        float share = p[i] / peak, code = rintf(-per_octave * binary_logarithm(share));
        code = code < 0.0f ? 0.0f : code;
        code = code > last || share < 0x1p-126f ? last : code;
        out[i] = values[(int32_t)code];
    }
}

static inline float largest(const float *restrict x, int64_t count) {
    float top = x[0];
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < count; i++)
        top = x[i] > top ? x[i] : top;
    return top;
}

/* The sum of e^(x - top). */
static inline float exponential_sum(const float *restrict x, int64_t count, float top) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++)
        sum += exponential(x[i] - top);
    return sum;
}

/* Codes of a row's softmax; divisor: the sum of its exponentials times the grid's scale. */
static void encode_shares(const float *restrict x, uint8_t *restrict codes, int64_t count, float top, float divisor, Grid grid) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++)
        codes[i] = (uint8_t)code(exponential(x[i] - top) / divisor, grid);
}

/* x: [rows, columns] -> codes of softmax(x) over columns, as `encode` has them. */
void softmax_encode(const float *x, uint8_t *codes, int64_t rows, int64_t columns, Grid grid, int32_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * columns > ALONE)
    for (int64_t row = 0; row < rows; row++) {
        const float *own = x + row * columns;
        float top = largest(own, columns);
        encode_shares(own, codes + row * columns, columns, top, exponential_sum(own, columns, top) * grid.scale, grid);
    }
}

/* What a row's softmax is on a log2 grid: the logarithm of e^(x - top) / sum / peak is a line in x. offset: log2(sum * peak). Powers are
   computed: some processors look up sixteen numbers in more time than that. */
static void share_powers(float *x, int64_t count, float top, float offset, float peak, float per_octave, float last) {
    float step = 1 / per_octave;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        float code = rintf(per_octave * (offset - (x[i] - top) * 1.44269504088896341f));
        code = code < 0.0f ? 0.0f : code;
        code = code > last ? last : code;
        float octaves = code * step;
        octaves = octaves > 126.0f ? 126.0f : octaves;
        float whole = rintf(octaves);
        float power = peak * power_of(-whole, (whole - octaves) * 0.69314718055994531f);
        x[i] = code < last && octaves < 126.0f ? power : 0.0f; /* smaller ones are no normal numbers */
    }
}

/* x: [rows, columns], becomes what `fake_log2` makes of softmax(x) over columns, but for the last digit. */
void softmax_log2(float *x, int64_t rows, int64_t columns, float peak, float per_octave, float last, int32_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * columns > ALONE)
    for (int64_t row = 0; row < rows; row++) {
        float *own = x + row * columns;
        float top = largest(own, columns), offset = (float)log2((double)exponential_sum(own, columns, top) * peak);
        share_powers(own, columns, top, offset, peak, per_octave, last);
    }
}
