// Rows of the embedding table into the residual stream, and the rows whose logits are wanted out of it.
// variants: DTYPE=0,1,2
#include "batch.cuh"

// Numbers that a block writes: several blocks share a wide row, so that a single row does not wait for one block.
#define SPAN 1024

// A block's part of a row of f32, or zeros.
DEVICE void copy_part(float* to, const float* from, u32 first, u32 end, u32 dim, bool real) {
    if (dim % 4 == 0) {
        for (u32 i = first + threadIdx.x * 4; i < end; i += blockDim.x * 4) {
            float4 four = {0.0f, 0.0f, 0.0f, 0.0f};
            if (real) four = *reinterpret_cast<const float4*>(from + i);
            *reinterpret_cast<float4*>(to + i) = four;
        }
    } else {
        for (u32 i = first + threadIdx.x; i < end; i += blockDim.x) to[i] = real ? from[i] : 0.0f;
    }
}

// Grid: [launch's rows, dim / SPAN rounded up], 128 threads. A row whose id is NONE takes the last token of its
// sequence's seat, one with IMAGE_ROW a row of `images`; rows beyond the micro-batch, and ids beyond the table or the
// images, become zeros.
// `last_tokens` may be written by another device between passes, so it is read the plain way.
extern "C" __global__ void __launch_bounds__(128)
embed(float* out, const T* table, const float* images, u32 image_rows, const u32* last_tokens, Batch batch, u32 dim,
      u32 vocab) {
    const u32 row = blockIdx.x;
    const bool real = row < batch.counts[COUNT_ROWS];
    u32 id = real ? batch.ids[row] : vocab;
    wait_for_previous();
    let_next_start();
    float* to = out + (u64)row * dim;
    const u32 first = blockIdx.y * SPAN, end = min(first + SPAN, dim);
    if (id != NONE && id & IMAGE_ROW) {
        const u32 image = id & ~IMAGE_ROW;
        copy_part(to, images + (u64)(image < image_rows ? image : 0) * dim, first, end, dim, image < image_rows);
        return;
    }
    if (real && id == NONE) id = last_tokens[batch.seq_seat[batch.row_seq[row]]];
    const bool known = id < vocab;
    const T* from = table + (u64)(known ? id : 0) * dim;
    const int len = Wide<T>::LEN;
    if (dim % len == 0) {
        for (u32 i = first + threadIdx.x * len; i < end; i += blockDim.x * len) {
            Wide<T> wide;
            if (known) *reinterpret_cast<uint4*>(&wide) = load_16_once(from + i);
#pragma unroll
            for (int j = 0; j < len; j += 4) {
                float4 four = {0.0f, 0.0f, 0.0f, 0.0f};
                if (known) four = {to_f32(wide.v[j]), to_f32(wide.v[j + 1]), to_f32(wide.v[j + 2]), to_f32(wide.v[j + 3])};
                *reinterpret_cast<float4*>(to + i + j) = four;
            }
        }
    } else {
        for (u32 i = first + threadIdx.x; i < end; i += blockDim.x) to[i] = known ? to_f32(from[i]) : 0.0f;
    }
}

// Grid: [launch's outputs, dim / SPAN rounded up], 128 threads. Rows beyond the micro-batch's outputs become zeros.
extern "C" __global__ void __launch_bounds__(128)
gather_outputs(float* out, const float* hidden, Batch batch, u32 dim) {
    const u32 output = blockIdx.x;
    const bool real = output < batch.counts[COUNT_OUTPUTS];
    const float* from = hidden + (real ? (u64)batch.output_row[output] * dim : 0);
    float* to = out + (u64)output * dim;
    const u32 first = blockIdx.y * SPAN, end = min(first + SPAN, dim);
    wait_for_previous();
    let_next_start();
    copy_part(to, from, first, end, dim, real);
}
