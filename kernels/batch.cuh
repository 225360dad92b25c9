// A micro-batch on the device. Counts live there too, since a recorded graph keeps its arguments: rows, sequences
// and outputs may be fewer than the launch was made for, and what is beyond them does nothing.
//
// These arrays are filled before the first kernel of a pass starts, so they may be read before `wait_for_previous`.
#pragma once

#include "common.cuh"

#define KV_BLOCK 16
#define NONE 0xffffffffu
#define IMAGE_ROW 0x80000000u

struct Batch {
    const u32* counts;      // [8]: rows, sequences, outputs, single-row sequences, prefill tiles
    const u32* ids;         // [rows]: NONE takes the last token of the sequence's seat; with IMAGE_ROW a row of images
    const u32* positions;   // [rows]
    const u32* row_seq;     // [rows]: which sequence
    const u32* seq_row;     // [seqs]: first row
    const u32* seq_rows;    // [seqs]: how many rows
    const u32* seq_len;     // [seqs]: tokens in the cache with this micro-batch's rows
    const u32* seq_blocks;  // [seqs]: where the sequence's blocks begin in `blocks`
    const u32* blocks;      // all sequences' KV blocks, one after another
    const u32* seq_seat;    // [seqs]: index into per-sequence tables
    const u32* single;      // [single-row sequences]: which sequences
    const uint2* tiles;     // [prefill tiles]: sequence (of several rows), first row counted within the sequence
    const u32* output_row;  // [outputs]
    const u32* output_seat; // [outputs]
    const float2* rotations; // [rows, head_dim / 2]: cosine and sine; written by the pass's first kernel
    const u32* turns;       // [rows, 3]: time, down, across; null where rows turn by their positions alone
};
#define COUNT_ROWS 0
#define COUNT_SEQS 1
#define COUNT_OUTPUTS 2
#define COUNT_SINGLE 3
#define COUNT_TILES 4
