/* C interface of the native CPU kernels: packed low-bit layers without torch, and the quantizer that trains them.

   Every function checks its arguments before it touches anything. It returns 0 (or what its comment says), or -1 with a
   text that gq_error() gives, which names the argument. Counts are of elements unless they are called bytes; arrays are
   contiguous, row-major, aligned as their elements are (64 bytes is fastest) and must not overlap. Strings are static or
   thread-local. Functions may be called from several threads at once, gq_use_isa excepted. */

#ifndef GQ_NATIVE_H
#define GQ_NATIVE_H

#include <stdint.h>

#if defined(_WIN32)
#define GQ_API __declspec(dllexport)
#else
#define GQ_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define GQ_ABI 4 /* raised with every change of this file that callers notice */

enum gq_codebook { GQ_FLOAT32 = 0, GQ_INT8 = 1, GQ_E4M3 = 2 }; /* q stands for q, q / 127 and q / 256 */
enum gq_activations { GQ_NONE = 0, GQ_ACTIVATIONS_INT8 = 1, GQ_ACTIVATIONS_E4M3 = 2 };

/* A weight (rows, columns): codes in panels, see panels.h. */
typedef struct {
    const uint8_t *panels;
    int64_t panel_bytes; /* gq_panel_bytes() */
    const void *codebook; /* 2^bits entries */
    int64_t codebook_bytes;
    const float *scale;
    int64_t scales; /* rows, or 1 for all */
    int64_t rows, columns;
    int32_t bits; /* 1 to 8 */
    int32_t groups; /* into which the rows fall equally: 4 gates of an LSTM, 3 of a GRU, else 1 */
    int32_t codebook_kind;
} gq_weight;

GQ_API int32_t gq_abi(void);
GQ_API const char *gq_error(void); /* of the calling thread's last failure */

GQ_API const char *gq_isas(void); /* what this processor can run, best first, separated by commas */
GQ_API const char *gq_isa(void); /* which of them is used: the first, unless chosen */
GQ_API int32_t gq_use_isa(const char *name);

/* Layouts. A panel's bytes, or -1. */
GQ_API int64_t gq_panel_bytes(int32_t bits, int64_t rows, int64_t columns, int32_t groups);
/* Bit planes to panels and back; `weight` describes the panels, which gq_to_panels fills. */
GQ_API int32_t gq_to_panels(const uint8_t *planes, int64_t plane_bytes, const gq_weight *weight);
GQ_API int32_t gq_to_planes(const gq_weight *weight, uint8_t *planes, int64_t plane_bytes);

/* Tokens (tokens, features) to integers and a scale for each token. */
GQ_API int32_t gq_quantize_tokens(const float *x, int64_t tokens, int64_t features, int8_t *q, float *scale);

/* y (tokens, rows) = x (tokens, columns) W^T + bias; bias (rows,) or NULL; at most `threads` threads. */
GQ_API int32_t gq_linear(const gq_weight *weight, int32_t activations, const float *x, int64_t x_count,
                         const float *bias, int64_t bias_count, float *y, int64_t y_count, int64_t tokens,
                         int32_t threads);

/* Every row of x, as many numbers as `weight` and `bias` have, less its mean, over the root of its variance and epsilon,
   times weight, plus bias. y may be x. */
GQ_API int32_t gq_layer_norm(const float *x, int64_t x_count, const float *weight, int64_t weight_count,
                             const float *bias, int64_t bias_count, float epsilon, float *y, int64_t y_count);

/* out (count, columns): the decoded rows of those indices. */
GQ_API int32_t gq_decode_rows(const gq_weight *weight, const int64_t *indices, int64_t count, float *out,
                              int64_t out_count);

/* One layer and direction of an LSTM (hr NULL or a projection) or a GRU (c0, c and hr NULL) over N rows of input.

   Time is given as segments, each four numbers: its first row of x and out, its first sequence, how many sequences
   (neighbouring rows), and the row of `out` in which the last states of these sequences begin, or -1 where they start
   from h0 and c0. Segments run in order. */
typedef struct {
    const gq_weight *ih, *hh, *hr; /* (G H, K), (G H, P), (P, H) */
    int32_t ih_activations, hh_activations, hr_activations;
    const float *x; /* (N, K) */
    int64_t x_count, steps; /* N */
    const float *h0, *c0; /* (B, P), (B, H) */
    int64_t h0_count, c0_count, sequences; /* B */
    const float *bias_ih, *bias_hh; /* (G H,), both or neither */
    int64_t bias_ih_count, bias_hh_count;
    const int64_t *segments; /* (S, 4) */
    int64_t segment_count;
    float *out; /* (N, P) */
    float *h, *c; /* (B, P), (B, H): the last states */
    int64_t out_count, h_count, c_count;
    int32_t threads;
} gq_recurrent_arguments;

GQ_API int32_t gq_recurrent(const gq_recurrent_arguments *arguments);

/* Depthwise convolution over time: x (batch, length, rows) -> y (batch, out_length, rows), zeros beyond the ends; the
   weight is (rows, taps). */
GQ_API int32_t gq_depthwise_conv1d(const gq_weight *weight, const float *x, int64_t x_count, const float *bias,
                                   int64_t bias_count, float *y, int64_t y_count, int64_t batch, int64_t length,
                                   int64_t stride, int64_t padding, int64_t dilation, int32_t threads);

/* Fake quantization as kernels/fake_quantize.py defines it, of a weight whose rows have a scale each: as many rows as
   there are scales. `table` is a flat table of 6 * 2^bits entries (kernels/tables.py), 1 to 8 bits. */
GQ_API int32_t gq_fake_quantize(const float *weight, int64_t weight_count, const float *scale, int64_t scales,
                                const float *table, int64_t table_count, int32_t soft, float *out, int64_t out_count,
                                int32_t threads);

/* The gradients of weight, scale and table, for that of the result; dtable may be NULL, for none of the table. They do
   not depend on the number of threads. */
GQ_API int32_t gq_fake_quantize_backward(const float *grad, int64_t grad_count, const float *weight,
                                         int64_t weight_count, const float *scale, int64_t scales, const float *table,
                                         int64_t table_count, float straight_through, float *dweight,
                                         int64_t dweight_count, float *dscale, int64_t dscale_count, float *dtable,
                                         int64_t dtable_count, int32_t threads);

/* Codes: how many of up to 255 sorted borders b satisfy scale * b < weight. */
GQ_API int32_t gq_encode(const float *weight, int64_t weight_count, const float *scale, int64_t scales,
                         const float *borders, int64_t border_count, uint8_t *codes, int64_t code_count,
                         int32_t threads);

/* Asks for huge pages for the part of an array that they can hold; does nothing where there are none. */
GQ_API void gq_advise_huge(void *array, int64_t bytes);

#ifdef __cplusplus
}
#endif

#endif
