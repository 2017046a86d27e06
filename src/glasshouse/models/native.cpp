// The inner loops of decoding for x86 CPUs with AVX-512, VNNI and bfloat16 dot products: what PyTorch's own operators do
// at the speed of its matrix library only for large batches is done here at the speed of memory for small ones.
//
// Plain C functions over raw memory, called from native.py, which checks shapes; tests/models/test_native.py compares
// each with plain PyTorch. No PyTorch header is used, so it compiles in seconds and does not depend on PyTorch's version.
//
// Two promises hold for every function. Each result is computed by one thread in one fixed order, so the numbers do not
// depend on the number of threads. Rows never mix, and a row is computed in the same order whatever rows come with it, so
// a row alone is bit-equal to the same row in a batch. (-ffp-contract=off keeps the compiler from breaking this.)
//
// Number formats: 0 is float32, 1 is bfloat16. Sums are float32, or exact in int32.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

typedef uint16_t bfloat16;
typedef int64_t index_t;

static const int BLOCK = 32;  // outputs that are computed together, and lie together in quantized weights

// ---- sixteen numbers at a time

static inline __mmask16 lanes(index_t count) { return count >= 16 ? 0xFFFF : (__mmask16)((1u << std::max<index_t>(count, 0)) - 1); }

static inline __m512 widen(__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); }
static inline __m512 load(const float* from, __mmask16 mask = 0xFFFF) { return _mm512_maskz_loadu_ps(mask, from); }
static inline __m512 load(const bfloat16* from, __mmask16 mask = 0xFFFF) { return widen(_mm256_maskz_loadu_epi16(mask, from)); }
static inline void store(float* to, __m512 value, __mmask16 mask = 0xFFFF) { _mm512_mask_storeu_ps(to, mask, value); }
static inline void store(bfloat16* to, __m512 value, __mmask16 mask = 0xFFFF) {
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(value));
}

// e^x to 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
static inline __m512 exponential(__m512 x) {
    // The second operand is returned where the first is not a number, so that such an x stays one.
    x = _mm512_max_ps(_mm512_set1_ps(-104.0f), _mm512_min_ps(_mm512_set1_ps(89.0f), x));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 sum = _mm512_set1_ps(1.0f / 5040);
    for (float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(factor));
    return _mm512_scalef_ps(sum, n);
}

// The gate of a feed-forward network: 1 SiLU, 2 GELU by tanh, 3 ReLU.
static inline __m512 activate(int activation, __m512 x) {
    if (activation == 3) return _mm512_max_ps(_mm512_setzero_ps(), x);
    __m512 slope = x;
    if (activation == 2) {
        const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
        slope = _mm512_mul_ps(_mm512_set1_ps(1.5957691216f), _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x));
    }
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(x, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), slope))));
}

// ---- activations as int8

// One scale for each group of 32 numbers of a row. An int8 weight meets groups of 64 of equal right: two scales less to apply.
struct Codes {
    index_t width = 0, groups = 0;  // numbers and groups of a row, rounded up to whole groups
    int group = 32;
    std::vector<int8_t> code;       // [rows, width]
    std::vector<float> scale;       // [rows, groups]
    std::vector<int32_t> offset;    // [rows, groups]: what unsigned weight codes add to a dot product
};

// `zero` is the weight code that stands for 0. Weight codes of 4 bits lie in pairs, low half first, so the numbers they
// meet are reordered once here, evens before odds in every eight, instead of the weights at every use.
template <class T>
static void encode_row(const T* hidden, index_t width, Codes& codes, index_t row, int zero) {
    const bool pairs = zero == 8;
    const __m128i order = pairs ? _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15)
                                : _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (index_t group = 0; group < codes.groups; group++) {
        const index_t start = group * codes.group;
        __m512 part[4], most = _mm512_setzero_ps();
        __mmask16 unordered = 0;
        const int parts = codes.group / 16;
        for (int i = 0; i < parts; i++) {
            part[i] = load(hidden + start + 16 * i, lanes(width - start - 16 * i));
            most = _mm512_max_ps(most, _mm512_abs_ps(part[i]));
            unordered |= _mm512_cmp_ps_mask(part[i], part[i], _CMP_UNORD_Q);
        }
        const float largest = _mm512_reduce_max_ps(most);
        const __m512 factor = _mm512_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
        int32_t sum = 0;
        for (int i = 0; i < parts; i++) {
            const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(part[i], factor));
            sum += _mm512_reduce_add_epi32(rounded);
            const __m128i bytes = _mm_shuffle_epi8(_mm512_cvtepi32_epi8(rounded), order);
            _mm_storeu_si128((__m128i*)(codes.code.data() + row * codes.width + start + 16 * i), bytes);
        }
        codes.scale[row * codes.groups + group] = unordered ? NAN : largest / 127.0f;
        codes.offset[row * codes.groups + group] = -zero * sum;
    }
}

template <class T>
static void encode(const T* hidden, index_t rows, index_t width, index_t stride, int bits, Codes& codes, int threads) {
    codes.group = bits == 8 ? 64 : 32;
    codes.groups = (width + codes.group - 1) / codes.group;
    codes.width = codes.groups * codes.group;
    if (codes.code.size() < (size_t)(rows * codes.width)) codes.code.resize(rows * codes.width);
    if (codes.scale.size() < (size_t)(rows * codes.groups)) codes.scale.resize(rows * codes.groups), codes.offset.resize(rows * codes.groups);
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > 32768)
    for (index_t row = 0; row < rows; row++) encode_row(hidden + row * stride, width, codes, row, bits == 8 ? 128 : 8);
}

// ---- 32 outputs of a few rows

struct Matrix {
    const void* weight;     // [outputs, width], or for codes [blocks, width / codes in four bytes, 32] times four bytes
    const bfloat16* scale;  // int8: [blocks, 32]; int4: [blocks, groups, 32]; else null
    const void* bias;       // [outputs] in the number format of the activations, or null
    index_t outputs;
};

struct Input {
    const void* hidden;
    index_t width, stride;
    const Codes* codes;
};

// Unsigned weight codes times signed activation codes, four at a time, exact in int32; a group's sum is then scaled.
template <int BITS, int ROWS>
static void product_of_codes(const Matrix& matrix, index_t block, const Input& input, index_t row, float (*out)[BLOCK]) {
    const Codes& codes = *input.codes;
    const int steps = BITS == 8 ? 16 : 4;  // of 32 outputs times four bytes in a group
    const __m512i low = _mm512_set1_epi8(15);
    const uint8_t* weight = (const uint8_t*)matrix.weight + block * codes.groups * steps * 4 * BLOCK;
    const bfloat16* scale = matrix.scale + block * BLOCK * (BITS == 8 ? 1 : codes.groups);
    const int8_t* code = codes.code.data() + row * codes.width;
    __m512 total[ROWS][2];
    for (int r = 0; r < ROWS; r++) total[r][0] = total[r][1] = _mm512_setzero_ps();
    for (index_t group = 0; group < codes.groups; group++) {
        __m512i sum[ROWS][2];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) sum[r][0] = sum[r][1] = _mm512_set1_epi32(codes.offset[(row + r) * codes.groups + group]);
#pragma GCC unroll 4
        for (int step = 0; step < steps; step++) {
            const __m512i left = _mm512_loadu_si512(weight), right = _mm512_loadu_si512(weight + 64);
            _mm_prefetch((const char*)weight + 4096, _MM_HINT_T0);
            _mm_prefetch((const char*)weight + 4160, _MM_HINT_T0);
            weight += 128;
            int32_t four;
            if (BITS == 8) {
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    memcpy(&four, code + r * codes.width, 4);
                    const __m512i activation = _mm512_set1_epi32(four);
                    sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], left, activation);
                    sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], right, activation);
                }
                code += 4;
            } else {
                const __m512i even[2] = {_mm512_and_si512(left, low), _mm512_and_si512(right, low)};
                const __m512i odd[2] = {_mm512_and_si512(_mm512_srli_epi16(left, 4), low), _mm512_and_si512(_mm512_srli_epi16(right, 4), low)};
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    memcpy(&four, code + r * codes.width, 4);
                    __m512i activation = _mm512_set1_epi32(four);
                    sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], even[0], activation);
                    sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], even[1], activation);
                    memcpy(&four, code + r * codes.width + 4, 4);
                    activation = _mm512_set1_epi32(four);
                    sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], odd[0], activation);
                    sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], odd[1], activation);
                }
                code += 8;
            }
        }
        __m512 factor[2] = {_mm512_set1_ps(1.0f), _mm512_set1_ps(1.0f)};
        if (BITS == 4) factor[0] = load(scale + group * BLOCK), factor[1] = load(scale + group * BLOCK + 16);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const __m512 own = _mm512_set1_ps(codes.scale[(row + r) * codes.groups + group]);
            for (int half = 0; half < 2; half++) {
                const __m512 combined = BITS == 4 ? _mm512_mul_ps(own, factor[half]) : own;
                total[r][half] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][half]), combined, total[r][half]);
            }
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int half = 0; half < 2; half++)
            store(out[r] + 16 * half, BITS == 8 ? _mm512_mul_ps(total[r][half], load(scale + 16 * half)) : total[r][half]);
}

static inline __m512 multiply_add(const bfloat16* weight, __m512i activation, __mmask32 mask, __m512 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_maskz_loadu_epi16(mask, weight), (__m512bh)activation);
}
static inline __m512 multiply_add(const float* weight, __m512i activation, __mmask32 mask, __m512 sum) {
    return _mm512_fmadd_ps(_mm512_maskz_loadu_ps((__mmask16)mask, weight), _mm512_castsi512_ps(activation), sum);
}
static inline __m512i take(const bfloat16* from, __mmask32 mask) { return _mm512_maskz_loadu_epi16(mask, from); }
static inline __m512i take(const float* from, __mmask32 mask) { return _mm512_maskz_loadu_epi32((__mmask16)mask, from); }

// Plain weights lie as PyTorch keeps them; four outputs at a time, each a dot product along its row.
template <class T, int ROWS>
static void product(const Matrix& matrix, index_t block, const Input& input, index_t row, float (*out)[BLOCK]) {
    const int at_once = 64 / sizeof(T);
    const T* hidden = (const T*)input.hidden + row * input.stride;
    const index_t end = std::min(matrix.outputs - block * BLOCK, (index_t)BLOCK);
    for (index_t output = 0; output < end; output += 4) {
        const T* weight[4];
        for (int c = 0; c < 4; c++) weight[c] = (const T*)matrix.weight + (block * BLOCK + std::min(output + c, end - 1)) * input.width;
        __m512 sum[ROWS][4];
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < 4; c++) sum[r][c] = _mm512_setzero_ps();
        for (index_t k = 0; k < input.width; k += at_once) {
            const index_t left = input.width - k;
            const __mmask32 mask = left >= at_once ? 0xFFFFFFFFu : (1u << left) - 1;
            __m512i activation[ROWS];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) activation[r] = take(hidden + r * input.stride + k, mask);
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) {
                // The next four rows follow in memory; a row is too short for the hardware to see where this goes.
                _mm_prefetch((const char*)(weight[0] + 4 * input.width + 4 * k) + 64 * c, _MM_HINT_T0);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) sum[r][c] = multiply_add(weight[c] + k, activation[r], mask, sum[r][c]);
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < 4; c++) out[r][output + c] = _mm512_reduce_add_ps(sum[r][c]);
    }
}

typedef void (*Product)(const Matrix&, index_t, const Input&, index_t, float (*)[BLOCK]);

template <int ROWS>
static Product choose(int format, int bits) {
    if (bits == 8) return product_of_codes<8, ROWS>;
    if (bits == 4) return product_of_codes<4, ROWS>;
    return format ? product<bfloat16, ROWS> : product<float, ROWS>;
}

template <class T>
static void finish(const Matrix& matrix, index_t block, const float* from, T* to, int activation, const float* gated) {
    for (int half = 0; half < BLOCK; half += 16) {
        const index_t first = block * BLOCK + half;
        const __mmask16 mask = lanes(matrix.outputs - first);
        __m512 value = load(from + half);
        if (matrix.bias) value = _mm512_add_ps(value, load((const T*)matrix.bias + first, mask));
        if (activation) value = activate(activation, value);
        if (gated) value = _mm512_mul_ps(load(gated + half), value);
        if (mask) store(to + first, value, mask);
    }
}

static const int AT_ONCE = 6;  // rows that share a load of weights: as many sums as the 32 registers hold

template <class T>
static void compute_block(const Matrix* matrices, int count, index_t item, const Input& input, index_t rows, T* out, index_t columns,
                          int activation, const Product* products) {
    const bool gated = count == 2 && activation;
    index_t first = 0;
    int which = 0;
    for (index_t blocks; !gated && item >= (blocks = (matrices[which].outputs + BLOCK - 1) / BLOCK); which++) {
        item -= blocks;
        first += matrices[which].outputs;
    }
    float sums[AT_ONCE][BLOCK], ups[AT_ONCE][BLOCK];
    for (index_t row = 0; row < rows; row += AT_ONCE) {
        const int some = (int)std::min<index_t>(AT_ONCE, rows - row);
        products[some - 1](matrices[which], item, input, row, sums);
        if (gated) products[some - 1](matrices[1], item, input, row, ups);
        for (int r = 0; r < some; r++) {
            T* to = out + (row + r) * columns + first;
            if (gated) {
                // The bias of "up" is added before the product with the gate.
                float up[BLOCK] = {};
                for (int half = 0; half < BLOCK; half += 16) {
                    const index_t start = item * BLOCK + half;
                    __m512 value = load(ups[r] + half);
                    if (matrices[1].bias) value = _mm512_add_ps(value, load((const T*)matrices[1].bias + start, lanes(matrices[1].outputs - start)));
                    store(up + half, value);
                }
                finish(matrices[0], item, sums[r], to, activation, up);
            } else {
                finish(matrices[which], item, sums[r], to, activation, nullptr);
            }
        }
    }
}

// Matrices of one kind that multiply the same rows, at most three.
struct Matrices {
    int format, bits;  // of activations and plain weights: 0 float32, 1 bfloat16; of codes: 8 or 4, 0 for plain weights
    int count, activation;
    index_t width;
    Matrix matrix[3];
};

// Their outputs side by side: out [rows, sum of outputs]. With an activation and two matrices: activation(first) * second.
static void multiply(const void* hidden, index_t rows, const Matrices& all, void* out, int threads) {
    const index_t width = all.width, stride = width;
    const int format = all.format, bits = all.bits, activation = all.activation, count = all.count;
    const Matrix* matrices = all.matrix;
    static thread_local Codes codes;
    const Input input = {hidden, width, stride, &codes};
    if (bits == 8 || bits == 4) {
        if (format) encode((const bfloat16*)hidden, rows, width, stride, bits, codes, threads);
        else encode((const float*)hidden, rows, width, stride, bits, codes, threads);
    }
    const Product products[AT_ONCE] = {choose<1>(format, bits), choose<2>(format, bits), choose<3>(format, bits),
                                       choose<4>(format, bits), choose<5>(format, bits), choose<6>(format, bits)};
    index_t columns = 0, items = 0;
    for (int i = 0; i < count; i++) {
        if (i > 0 && activation) break;
        columns += matrices[i].outputs;
        items += (matrices[i].outputs + BLOCK - 1) / BLOCK;
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * columns * width > 100000)
    for (index_t item = 0; item < items; item++) {
        if (format) compute_block(matrices, count, item, input, rows, (bfloat16*)out, columns, activation, products);
        else compute_block(matrices, count, item, input, rows, (float*)out, columns, activation, products);
    }
}

extern "C" {

void glasshouse_linear(const void* hidden, index_t rows, const Matrices* matrices, void* out, int threads) {
    multiply(hidden, rows, *matrices, out, threads);
}

}  // extern "C"

// ---- norm and rotary positions

template <class T>
static void norm_row(const T* from, const T* weight, index_t width, float epsilon, T* to) {
    __m512 squares = _mm512_setzero_ps();
    for (index_t i = 0; i < width; i += 16) {
        const __m512 value = load(from + i, lanes(width - i));
        squares = _mm512_fmadd_ps(value, value, squares);
    }
    const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / width + epsilon));
    for (index_t i = 0; i < width; i += 16) {
        const __mmask16 mask = lanes(width - i);
        store(to + i, _mm512_mul_ps(_mm512_mul_ps(load(from + i, mask), factor), load(weight + i, mask)), mask);
    }
}

// Turn the pairs (i, i + width / 2) of a head by the angles of its position.
template <class T>
static void rotate_head(T* head, const T* cosine, const T* sine, index_t width) {
    const index_t half = width / 2;
    for (index_t i = 0; i < half; i += 16) {
        const __mmask16 mask = lanes(half - i);
        const __m512 left = load(head + i, mask), right = load(head + half + i, mask);
        const __m512 first = _mm512_mul_ps(left, load(cosine + i, mask)), second = _mm512_mul_ps(right, load(cosine + half + i, mask));
        store(head + i, _mm512_fnmadd_ps(right, load(sine + i, mask), first), mask);
        store(head + half + i, _mm512_fmadd_ps(left, load(sine + half + i, mask), second), mask);
    }
}

template <class T>
static void norms(const T* hidden, index_t rows, index_t width, const T* weight, float epsilon, T* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > 32768)
    for (index_t row = 0; row < rows; row++) norm_row(hidden + row * width, weight, width, epsilon, out + row * width);
}

template <class T>
static void turn(T* heads, index_t rows, index_t stride, index_t query_heads, index_t all_heads, index_t width, const T* query_norm,
                 const T* key_norm, float epsilon, const T* cosine, const T* sine, index_t table_rows, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * all_heads * width > 32768)
    for (index_t row = 0; row < rows; row++)
        for (index_t head = 0; head < all_heads; head++) {
            T* at = heads + row * stride + head * width;
            const T* norm = head < query_heads ? query_norm : key_norm;
            if (norm) norm_row(at, norm, width, epsilon, at);
            if (cosine) rotate_head(at, cosine + row % table_rows * width, sine + row % table_rows * width, width);
        }
}

// The norm (where there is one) and the rotation (where there is a table) of the query and key heads of each row.
struct Turn {
    index_t query_heads, turned_heads, head_width, table_rows;
    const void *query_norm, *key_norm, *cosine, *sine;
    float epsilon;
};

static void turn_heads(void* heads, index_t rows, index_t columns, const Turn& by, int format, int threads) {
    if (!by.query_norm && !by.cosine) return;
    if (format)
        turn((bfloat16*)heads, rows, columns, by.query_heads, by.turned_heads, by.head_width, (const bfloat16*)by.query_norm,
             (const bfloat16*)by.key_norm, by.epsilon, (const bfloat16*)by.cosine, (const bfloat16*)by.sine, by.table_rows, threads);
    else
        turn((float*)heads, rows, columns, by.query_heads, by.turned_heads, by.head_width, (const float*)by.query_norm,
             (const float*)by.key_norm, by.epsilon, (const float*)by.cosine, (const float*)by.sine, by.table_rows, threads);
}

static index_t columns_of(const Matrices& all) {
    index_t columns = 0;
    for (int i = 0; i < all.count; i++) columns += all.matrix[i].outputs;
    return columns;
}

extern "C" {

void glasshouse_norm(const void* hidden, index_t rows, index_t width, int format, const void* weight, float epsilon, void* out, int threads) {
    if (format) norms((const bfloat16*)hidden, rows, width, (const bfloat16*)weight, epsilon, (bfloat16*)out, threads);
    else norms((const float*)hidden, rows, width, (const float*)weight, epsilon, (float*)out, threads);
}

// Queries, keys and values of the rows, side by side: out [rows, all outputs], the first heads turned.
void glasshouse_heads(const void* hidden, index_t rows, const Matrices* matrices, const Turn* by, void* out, int threads) {
    multiply(hidden, rows, *matrices, out, threads);
    turn_heads(out, rows, columns_of(*matrices), *by, matrices->format, threads);
}

}  // extern "C"

// ---- attention of one new token a row

// Where the keys and values of a row lie: position p is in block table[p / block_size], at p % block_size.
struct Pages {
    void *keys, *values;
    index_t block_size, block_stride, position_stride, head_stride;  // strides in numbers
    const int32_t* tables;   // [batch, table_width]
    const int32_t* lengths;  // [batch]: tokens before the new one
    index_t table_width;
};

static inline index_t position(const Pages& pages, const int32_t* table, index_t p) {
    return table[p / pages.block_size] * pages.block_stride + p % pages.block_size * pages.position_stride;
}

template <class T>
static void keep(const T* key, const T* value, index_t stride, const Pages& pages, index_t batch, index_t groups, index_t width) {
    for (index_t row = 0; row < batch; row++) {
        const index_t at = position(pages, pages.tables + row * pages.table_width, pages.lengths[row]);
        for (index_t group = 0; group < groups; group++) {
            memcpy((T*)pages.keys + at + group * pages.head_stride, key + row * stride + group * width, width * sizeof(T));
            memcpy((T*)pages.values + at + group * pages.head_stride, value + row * stride + group * width, width * sizeof(T));
        }
    }
}

// `visit(p, at)` for each position p from `first` on, where `at` is where its numbers begin; block by block, because a
// division for every position would take longer than the rest.
template <class Visit>
static inline void each_position(const Pages& pages, const int32_t* table, index_t first, index_t count, Visit visit) {
    for (index_t p = 0; p < count;) {
        const index_t within = (first + p) % pages.block_size, end = std::min(count, p + pages.block_size - within);
        for (index_t at = position(pages, table, first + p); p < end; p++, at += pages.position_stride) visit(p, at);
    }
}

// CHUNKS sixteens of numbers make a head; 0 where that is not known here, or the last is not whole.
template <class T, int CHUNKS>
static void attend_group(const T* query, const Pages& pages, index_t row, index_t group, index_t shared, index_t width, index_t window,
                         float scale, T* out) {
    static thread_local std::vector<float> scores;
    const int32_t* table = pages.tables + row * pages.table_width;
    const index_t last = pages.lengths[row], first = window > 0 ? std::max<index_t>(0, last + 1 - window) : 0, seen = last + 1 - first;
    const index_t chunks = CHUNKS ? CHUNKS : (width + 15) / 16;
    const T *keys = (const T*)pages.keys + group * pages.head_stride, *values = (const T*)pages.values + group * pages.head_stride;
    auto mask = [&](index_t c) { return CHUNKS ? (__mmask16)0xFFFF : lanes(width - 16 * c); };
    if ((index_t)scores.size() < seen) scores.resize(2 * seen);
    float* score = scores.data();
    for (index_t head = 0; head < shared; head++) {
        __m512 part[CHUNKS ? CHUNKS : 16];
        for (index_t c = 0; c < chunks; c++)
            part[c] = _mm512_mul_ps(load(query + head * width + 16 * c, mask(c)), _mm512_set1_ps(scale));
        float most = -INFINITY;
        each_position(pages, table, first, seen, [&](index_t p, index_t at) {
            __m512 sum = _mm512_setzero_ps();
            for (index_t c = 0; c < chunks; c++) sum = _mm512_fmadd_ps(part[c], load(keys + at + 16 * c, mask(c)), sum);
            score[p] = _mm512_reduce_add_ps(sum);
            most = std::max(most, score[p]);
        });
        __m512 total = _mm512_setzero_ps();
        for (index_t p = 0; p < seen; p += 16) {
            const __mmask16 left = lanes(seen - p);
            const __m512 weight = _mm512_maskz_mov_ps(left, exponential(_mm512_sub_ps(load(score + p, left), _mm512_set1_ps(most))));
            store(score + p, weight, left);
            total = _mm512_add_ps(total, weight);
        }
        const __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
        for (index_t c = 0; c < chunks; c++) part[c] = _mm512_setzero_ps();
        each_position(pages, table, first, seen, [&](index_t p, index_t at) {
            const __m512 weight = _mm512_set1_ps(score[p]);
            for (index_t c = 0; c < chunks; c++) part[c] = _mm512_fmadd_ps(weight, load(values + at + 16 * c, mask(c)), part[c]);
        });
        for (index_t c = 0; c < chunks; c++) store(out + head * width + 16 * c, _mm512_mul_ps(part[c], share), mask(c));
    }
}

// Keep each row's new key and value (where given), then read with its query: query and out [batch, heads, width] with a row
// stride for the query and for key and value [batch, groups, width]; width at most 256. Rows of one text, at positions one
// after another, see each other: all are kept before any is read.
template <class T>
static void attend(const T* query, index_t query_stride, const T* key, const T* value, index_t key_stride, const Pages& pages,
                   index_t batch, index_t heads, index_t groups, index_t width, index_t window, float scale, T* out, int threads) {
    const index_t shared = heads / groups;
    if (key) keep(key, value, key_stride, pages, batch, groups, width);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (index_t item = 0; item < batch * groups; item++) {
        const index_t row = item / groups, group = item % groups;
        auto read = width == 64 ? attend_group<T, 4> : width == 128 ? attend_group<T, 8> : attend_group<T, 0>;
        read(query + row * query_stride + group * shared * width, pages, row, group, shared, width, window, scale,
             out + (row * heads + group * shared) * width);
    }
}

extern "C" {

void glasshouse_attend(const void* query, index_t query_stride, const void* key, const void* value, index_t key_stride, const Pages* pages,
                       index_t batch, index_t heads, index_t groups, index_t width, index_t window, float scale, int format, void* out,
                       int threads) {
    if (format)
        attend((const bfloat16*)query, query_stride, (const bfloat16*)key, (const bfloat16*)value, key_stride, *pages, batch, heads,
               groups, width, window, scale, (bfloat16*)out, threads);
    else
        attend((const float*)query, query_stride, (const float*)key, (const float*)value, key_stride, *pages, batch, heads, groups, width,
               window, scale, (float*)out, threads);
}

}  // extern "C"

// ---- a block of a decoder, for one new token a row

struct Block {
    const Matrices *heads, *output, *first, *second;
    const void *attention_norm, *feed_forward_norm;
    index_t groups, window;
    float scale, epsilon;
};

template <class T>
static void add(const T* left, const T* right, index_t count, T* out) {
    for (index_t i = 0; i < count; i += 16) {
        const __mmask16 mask = lanes(count - i);
        store(out + i, _mm512_add_ps(load(left + i, mask), load(right + i, mask)), mask);
    }
}

// The same functions in the same order as one by one, without a way through Python between them, which takes longer than
// they do. Rows beyond the texts in `pages` are padding: they read nothing.
template <class T>
static void compute_layer(const T* hidden, index_t rows, const Block& block, const Turn& by, const Pages& pages, index_t texts, T* out,
                          int threads) {
    static thread_local std::vector<T> normed, heads, read, middle, inner;
    const index_t width = block.heads->width, columns = columns_of(*block.heads), head = by.head_width;
    const index_t read_width = by.query_heads * head, key_at = read_width, value_at = by.turned_heads * head;
    auto room = [](std::vector<T>& memory, index_t count) { if ((index_t)memory.size() < count) memory.resize(count); };
    room(normed, rows * width), room(middle, rows * width), room(heads, rows * columns), room(read, rows * read_width);
    room(inner, rows * block.second->width);
    norms(hidden, rows, width, (const T*)block.attention_norm, block.epsilon, normed.data(), threads);
    multiply(normed.data(), rows, *block.heads, heads.data(), threads);
    turn_heads(heads.data(), rows, columns, by, block.heads->format, threads);
    std::fill(read.begin() + texts * read_width, read.begin() + rows * read_width, (T)0);
    attend(heads.data(), columns, heads.data() + key_at, heads.data() + value_at, columns, pages, texts, by.query_heads, block.groups,
           head, block.window, block.scale, read.data(), threads);
    multiply(read.data(), rows, *block.output, normed.data(), threads);
    add(hidden, normed.data(), rows * width, middle.data());
    norms(middle.data(), rows, width, (const T*)block.feed_forward_norm, block.epsilon, normed.data(), threads);
    multiply(normed.data(), rows, *block.first, inner.data(), threads);
    multiply(inner.data(), rows, *block.second, normed.data(), threads);
    add(middle.data(), normed.data(), rows * width, out);
}

extern "C" {

void glasshouse_block(const void* hidden, index_t rows, const Block* block, const Turn* by, const Pages* pages, index_t texts, void* out,
                      int threads) {
    if (block->heads->format) compute_layer((const bfloat16*)hidden, rows, *block, *by, *pages, texts, (bfloat16*)out, threads);
    else compute_layer((const float*)hidden, rows, *block, *by, *pages, texts, (float*)out, threads);
}

}  // extern "C"
