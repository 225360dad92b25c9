// Pixels of images and of videos' frames to the patches that a vision tower reads, in the tower's order of rows.
// SIDE: pixels along a patch; FRAMES: frames of a patch; MERGE: patches along a cell.
// variants: DTYPE=0,1,2 SIDE=14,16 FRAMES=2 MERGE=2
// variants: DTYPE=0,2 SIDE=3 FRAMES=1 MERGE=1
#include "common.cuh"

constexpr u32 SQUARE = SIDE * SIDE, LEN = 3 * FRAMES * SQUARE;

// Where an image is, counted in cells and in bytes: `Picture` in patches.rs.
struct Picture {
    u32 first;       // of its cells, among those of the pass
    u32 across;      // cells of a row
    u32 together;    // cells of as many frames as a patch has
    u32 width;       // pixels of a row
    u32 pixels;      // where its first frame begins
    u32 frames;      // the last one is repeated
    u32 frame_bytes;
    u32 levels;      // where the floats begin that levels become: [3][256]
};

// out[row][colour][frame][y][x] = what the pixel's level becomes. `from` begins with the pictures. A block a row.
extern "C" __global__ void __launch_bounds__(128)
cut_patches(T* out, const u8* __restrict__ from, const u32* __restrict__ cells, u32 count) {
    const u32 row = blockIdx.x, within = row % (MERGE * MERGE);
    wait_for_previous();
    let_next_start();
    const u32 cell = cells[row / (MERGE * MERGE)];
    const Picture* const pictures = reinterpret_cast<const Picture*>(from);
    u32 low = 0, high = count;
    while (high - low > 1) {
        const u32 middle = (low + high) / 2;
        if (pictures[middle].first <= cell) low = middle;
        else high = middle;
    }
    const Picture p = pictures[low];
    const u32 at = cell - p.first, time = at / p.together, place = at % p.together;
    const u32 top = (place / p.across * MERGE + within / MERGE) * SIDE;
    const u32 left = (place % p.across * MERGE + within % MERGE) * SIDE;
    const float* const levels = reinterpret_cast<const float*>(from + p.levels);
    T* const to = out + (u64)row * LEN;
    for (u32 i = threadIdx.x; i < LEN; i += blockDim.x) {
        const u32 colour = i / (FRAMES * SQUARE), y = i % SQUARE / SIDE, x = i % SIDE;
        const u32 frame = min(time * FRAMES + i / SQUARE % FRAMES, p.frames - 1);
        const u64 pixel = (u64)frame * p.frame_bytes + 3 * ((u64)(top + y) * p.width + left + x);
        to[i] = From<T>::f32(levels[colour * 256 + from[p.pixels + pixel + colour]]);
    }
}
