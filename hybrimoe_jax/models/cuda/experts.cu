// The routed experts of a MoE layer at decode, from a pool of packed experts, in two kernels: silu(gate) * up, then down
// with the weighted sum over experts. Codes are read as they lie (formats/layout.py): 16 neighbouring bytes a thread,
// each once however many rows want the expert, none of an expert that is not in the pool. They are unpacked in
// registers; nothing of a matrix's size is written.
//
// scripts/make_ptx.py compiles this for each BITS (4 or 8) and ROWS (1 or 8, the most rows of a call) to the PTX files
// beside it. The tests run the same source on a CPU (tests/cuda_emulation.cpp).
//
// Shapes: N rows, k experts a row, slots [N, k] with -1 for one that is not here. A line is 32 bytes of a panel: 8
// outputs by INPUTS inputs; a thread takes half of it, 4 outputs. Inputs [.., depth] are padded with zeros.

#ifdef __CUDACC__
typedef unsigned char byte;
#define SHARED __shared__
#define UNROLL _Pragma("unroll")

__device__ uint4 load16(const void* at) { return __ldg((const uint4*)at); }
__device__ uint2 load8(const void* at) { return __ldg((const uint2*)at); }
__device__ unsigned load4(const void* at) { return __ldg((const unsigned*)at); }
__device__ float as_float(unsigned bits) { return __uint_as_float(bits); }
__device__ float half_to_float(unsigned bits) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"((unsigned short)bits));
    return out;
}
#endif

constexpr int INPUTS = 32 / BITS, PANEL = 8, HALF = 4, LINE = 32, WARP = 32;
constexpr int GATE_UP_THREADS = 256, DOWN_THREADS = 512;
constexpr int MOST_PAIRS = 128;  // N * k

// What the kernels are told, as int32 numbers in this order (`_shape` in packed_cuda.py).
struct Shape {
    int rows, top;            // N and k
    int expert_bytes;         // from one expert of the pool to the next
    int first, second;        // where the matrix begins in an expert; where gate and up do
    int outputs, panels;      // R; R / 8, rounded up
    int depth, lines;         // K, padded; lines of a panel
    int groups, group_shift;  // line >> group_shift is a line's group
    int scales_at, wide;      // scales are float32, else float16
    int zeros_at, middle;     // zeros_at 0: there are no zero points, `middle` is the zero of all
    int pitch;                // from one row of outputs to the next
};

// Half a line as it lies: the codes of 4 outputs, their scales (`more` only where they are float32), their zero points.
struct Half {
    uint4 codes;
    uint2 scales, more;
    unsigned zeros;
};

__device__ Half load_half(const byte* matrix, const Shape& shape, int panel, int line, int half) {
    Half out;
    out.codes = load16(matrix + ((long long)panel * shape.lines + line) * LINE + half * 16);
    const int at = (panel * shape.groups + (line >> shape.group_shift)) * PANEL + half * HALF;
    const byte* scales = matrix + shape.scales_at + at * (shape.wide ? 4 : 2);
    out.scales = load8(scales);
    out.more = shape.wide ? load8(scales + 8) : out.scales;
    out.zeros = shape.zeros_at ? load4(matrix + shape.zeros_at + at) : shape.middle * 0x01010101u;
    return out;
}

__device__ float scale_of(const Half& part, bool wide, int output) {
    const unsigned first = output < 2 ? part.scales.x : part.scales.y;
    const unsigned bits[] = {part.scales.x, part.scales.y, part.more.x, part.more.y};
    return wide ? as_float(bits[output]) : half_to_float(first >> 16 * (output % 2) & 0xffff);
}

// Input i of an output's four bytes less the zero. Byte j holds input j; int4: j in its low half, 4 + j in its high.
__device__ float unpack(unsigned word, int i, int zero) {
    const int shift = 8 * (i % 4);
    const int code = BITS == 4 ? int(word >> (shift + 4 * (i / 4)) & 15) : int(word << (24 - shift)) >> 24;
    return float(code - zero);
}

// Adds half a line's products to the sums of each row, whose inputs begin at x + at[row]; below 0 it takes no part.
__device__ void add_half(const Half& part, const Shape& shape, const float* x, const int (&at)[ROWS],
                         const float (&weight)[ROWS], int line, float (&sums)[ROWS][HALF]) {
    const unsigned words[] = {part.codes.x, part.codes.y, part.codes.z, part.codes.w};
    float codes[HALF][INPUTS], scales[HALF];
    UNROLL for (int output = 0; output < HALF; output++) {
        const int zero = part.zeros >> 8 * output & 255;
        scales[output] = scale_of(part, shape.wide, output);
        UNROLL for (int i = 0; i < INPUTS; i++) codes[output][i] = unpack(words[output], i, zero);
    }
    UNROLL for (int row = 0; row < ROWS; row++) {
        if (ROWS > 1 && at[row] < 0) continue;
        float inputs[INPUTS];
        UNROLL for (int i = 0; i < INPUTS; i += 4) {
            const uint4 bits = load16(x + at[row] + line * INPUTS + i);
            inputs[i] = as_float(bits.x), inputs[i + 1] = as_float(bits.y);
            inputs[i + 2] = as_float(bits.z), inputs[i + 3] = as_float(bits.w);
        }
        UNROLL for (int output = 0; output < HALF; output++) {
            float sum = 0;
            UNROLL for (int i = 0; i < INPUTS; i++) sum += codes[output][i] * inputs[i];
            sums[row][output] += sum * (scales[output] * weight[row]);
        }
    }
}

// The sums of a warp's threads, for each row and output of the panel. Even threads hold outputs 0-3, odd ones 4-7.
__device__ void reduce_warp(const float (&sums)[ROWS][HALF], float (&out)[ROWS][PANEL]) {
    const int lane = threadIdx.x % WARP;
    UNROLL for (int row = 0; row < ROWS; row++)
        UNROLL for (int output = 0; output < HALF; output++) {
            float sum = sums[row][output];
            UNROLL for (int step = 2; step < WARP; step *= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
            if (lane < 2) out[row][lane * HALF + output] = sum;
        }
}

template <int WARPS>
__device__ float total(const float (*parts)[ROWS][PANEL], int row, int output) {
    float sum = 0;
    for (int warp = 0; warp < WARPS; warp++) sum += parts[warp][row][output];
    return sum;
}

// The first of a row's places that holds the slot, or -1.
__device__ int place_of(const int* slots, const Shape& shape, int row, int slot) {
    for (int place = 0; row < shape.rows && place < shape.top; place++)
        if (slots[row * shape.top + place] == slot) return place;
    return -1;
}

// inner [N, k, pitch] = silu(gate) * up of x [N, depth]; zeros past the last output and where a slot is -1.
// A block computes one panel for one expert, half of its warps gate and the others up: grid (pitch / 8, N * k). Of the
// places with the same slot, the first computes the rows of all.
extern "C" __global__ void __launch_bounds__(GATE_UP_THREADS)
silu_gate_up(const float* __restrict__ x, const int* __restrict__ slots, const byte* __restrict__ pool,
             const Shape* __restrict__ told, float* __restrict__ inner) {
    constexpr int THREADS = GATE_UP_THREADS / 2, WARPS = THREADS / WARP;
    SHARED int places[ROWS];
    SHARED float parts[2 * WARPS][ROWS][PANEL];
    const Shape shape = *told;
    const int panel = blockIdx.x, pair = blockIdx.y, thread = threadIdx.x, slot = slots[pair];
    if (slot < 0 || panel >= shape.panels) {
        if (thread < PANEL) inner[pair * shape.pitch + panel * PANEL + thread] = 0;
        return;
    }
    if (thread < ROWS) places[thread] = place_of(slots, shape, thread, slot);
    __syncthreads();
    int at[ROWS], first = -1;
    float ones[ROWS];
    UNROLL for (int row = 0; row < ROWS; row++) {
        at[row] = places[row] < 0 ? -1 : row * shape.depth;
        ones[row] = 1;
        if (first < 0 && places[row] >= 0) first = row * shape.top + places[row];
    }
    if (first != pair) return;

    const byte* matrix = pool + (long long)slot * shape.expert_bytes + (thread < THREADS ? shape.first : shape.second);
    float sums[ROWS][HALF] = {};
    for (int line = thread % THREADS / 2; line < shape.lines; line += THREADS / 2)
        add_half(load_half(matrix, shape, panel, line, thread % 2), shape, x, at, ones, line, sums);
    reduce_warp(sums, parts[thread / WARP]);
    __syncthreads();
    const int row = thread / PANEL, output = thread % PANEL;
    if (row >= ROWS || places[row] < 0) return;
    const float gate = total<WARPS>(parts, row, output), up = total<WARPS>(parts + WARPS, row, output);
    inner[(row * shape.top + places[row]) * shape.pitch + panel * PANEL + output] = gate / (1 + expf(-gate)) * up;
}

// out [N, R] = acc + the sum over a row's places of weight * down(inner [N, k, depth]).
// A block computes one panel: grid (panels). Its warps share the lines of all experts that are here.
extern "C" __global__ void __launch_bounds__(DOWN_THREADS)
add_down(const float* __restrict__ acc, const float* __restrict__ inner, const int* __restrict__ slots,
         const float* __restrict__ weights, const byte* __restrict__ pool, const Shape* __restrict__ told,
         float* __restrict__ out) {
    constexpr int WARPS = DOWN_THREADS / WARP, LINES = WARP / 2;
    SHARED int known[MOST_PAIRS], is_first[MOST_PAIRS], count;
    SHARED int slot_of[MOST_PAIRS], at_of[MOST_PAIRS][ROWS];
    SHARED float weight_of[MOST_PAIRS][ROWS], parts[WARPS][ROWS][PANEL];
    const Shape shape = *told;
    const int panel = blockIdx.x, thread = threadIdx.x, pairs = shape.rows * shape.top;

    // The experts that are here, each once, in the order of their first places.
    const int slot = thread < pairs ? slots[thread] : -1;
    if (thread < pairs) known[thread] = slot;
    __syncthreads();
    if (thread < pairs) {
        is_first[thread] = slot >= 0;
        for (int pair = 0; pair < thread; pair++)
            if (known[pair] == slot) is_first[thread] = 0;
    }
    __syncthreads();
    int index = 0;
    for (int pair = 0; pair < pairs && pair < thread; pair++) index += is_first[pair];
    if (thread == DOWN_THREADS - 1) count = index;
    if (thread < pairs && is_first[thread]) {
        slot_of[index] = slot;
        for (int row = 0; row < ROWS; row++) {
            const int place = place_of(known, shape, row, slot);
            float weight = 0;
            for (int other = place; place >= 0 && other < shape.top; other++)
                if (known[row * shape.top + other] == slot) weight += weights[row * shape.top + other];
            at_of[index][row] = place < 0 ? -1 : (row * shape.top + place) * shape.depth;
            weight_of[index][row] = weight;
        }
    }
    __syncthreads();

    const int tasks = (shape.lines + LINES - 1) / LINES;
    float sums[ROWS][HALF] = {};
    for (int task = thread / WARP; task < count * tasks; task += WARPS) {
        const int one = task / tasks, line = task % tasks * LINES + thread % WARP / 2;
        if (line >= shape.lines) continue;
        int at[ROWS];
        float weight[ROWS];
        UNROLL for (int row = 0; row < ROWS; row++) at[row] = at_of[one][row], weight[row] = weight_of[one][row];
        const byte* expert = pool + (long long)slot_of[one] * shape.expert_bytes;
        add_half(load_half(expert + shape.first, shape, panel, line, thread % 2), shape, inner, at, weight, line, sums);
    }
    reduce_warp(sums, parts[thread / WARP]);
    __syncthreads();
    const int row = thread / PANEL, output = thread % PANEL, place = panel * PANEL + output;
    if (row >= shape.rows || place >= shape.outputs) return;
    out[row * shape.pitch + place] = acc[row * shape.pitch + place] + total<WARPS>(parts, row, output);
}
