// experts.cu on a CPU: its threads are fibers of one thread, run in turns from barrier to barrier. Every load that the
// source makes through load16, load8 and load4 is checked against the buffers that were declared, and counted.

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct dim3 { int x, y, z; };
typedef unsigned char byte;
static dim3 threadIdx, blockIdx;

#define __device__ static
#define __global__
#define __launch_bounds__(threads)
#define SHARED static
#define UNROLL

struct Buffer { const byte* begin; size_t size; byte* times_read; };
static std::vector<Buffer> buffers;
static long long loads[17];

template <class T> static T load(const void* at) {
    for (const Buffer& buffer : buffers) {
        const size_t offset = (const byte*)at - buffer.begin;
        if ((const byte*)at < buffer.begin || offset + sizeof(T) > buffer.size) continue;
        if (offset % sizeof(T)) break;
        if (buffer.times_read) {
            loads[sizeof(T)]++;
            for (size_t i = 0; i < sizeof(T); i++) buffer.times_read[offset + i]++;
        }
        T out;
        std::memcpy(&out, at, sizeof(T));
        return out;
    }
    std::fprintf(stderr, "a load of %zu bytes outside of every buffer, or not aligned\n", sizeof(T));
    std::abort();
}
static uint4 load16(const void* at) { return load<uint4>(at); }
static uint2 load8(const void* at) { return load<uint2>(at); }
static unsigned load4(const void* at) { return load<unsigned>(at); }
static float as_float(unsigned bits) { float out; std::memcpy(&out, &bits, 4); return out; }
static float half_to_float(unsigned bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent ? std::ldexp(float(1024 + fraction), exponent - 25) : std::ldexp(float(fraction), -24);
    return bits & 0x8000 ? -size : size;
}

// A fiber begins by setcontext; after that jumps switch, for they make no system call.
struct Fiber {
    ucontext_t begin;
    jmp_buf at;
    bool begun, done;
    std::vector<char> stack = std::vector<char>(32768);
};
static std::vector<Fiber> fibers;
static jmp_buf scheduler;
static int current;

static void yield() {
    if (!_setjmp(fibers[current].at)) _longjmp(scheduler, 1);
}
static void resume() {
    Fiber& fiber = fibers[current];
    if (_setjmp(scheduler)) return;
    if (fiber.begun) _longjmp(fiber.at, 1);
    fiber.begun = true;
    setcontext(&fiber.begin);
}
struct Barrier {
    int arrived = 0, generation = 0;
    void wait(int expected) {
        const int mine = generation;
        if (++arrived == expected) arrived = 0, generation++;
        else while (generation == mine) yield();
    }
};
static Barrier block_barrier, warp_barriers[32];
static float exchanged[32][2][32];
static int turn[1024];
static void __syncthreads() { block_barrier.wait(int(fibers.size())); }
static float __shfl_xor_sync(unsigned, float value, int mask) {
    const int warp = current / 32, lane = current % 32, side = turn[current]++ & 1;
    exchanged[warp][side][lane] = value;
    warp_barriers[warp].wait(32);
    return exchanged[warp][side][lane ^ mask];
}

#include "experts.cu"

static int kernel;
static void** args;
static void run_thread() {
    const auto a = [](int i) { return args[i]; };
    if (kernel == 0)
        silu_gate_up((float*)a(0), (int*)a(1), (byte*)a(2), (Shape*)a(3), (float*)a(4));
    else
        add_down((float*)a(0), (float*)a(1), (int*)a(2), (float*)a(3), (byte*)a(4), (Shape*)a(5), (float*)a(6));
    fibers[current].done = true;
    yield();
}

extern "C" void declare(const byte* begin, size_t size, byte* times_read) { buffers.push_back({begin, size, times_read}); }
extern "C" void forget() { buffers.clear(); std::memset(loads, 0, sizeof loads); }
extern "C" long long loads_of(int size) { return loads[size]; }
extern "C" int most_pairs() { return MOST_PAIRS; }
extern "C" int threads_of(int which) { return which == 0 ? GATE_UP_THREADS : DOWN_THREADS; }

extern "C" void launch(int which, int grid_x, int grid_y, int threads, void** arguments) {
    kernel = which, args = arguments;
    fibers.resize(threads);
    for (blockIdx.y = 0; blockIdx.y < grid_y; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < grid_x; blockIdx.x++) {
            block_barrier = Barrier();
            for (Barrier& barrier : warp_barriers) barrier = Barrier();
            std::memset(turn, 0, sizeof turn);
            for (Fiber& fiber : fibers) {
                fiber.begun = fiber.done = false;
                getcontext(&fiber.begin);
                fiber.begin.uc_stack.ss_sp = fiber.stack.data(), fiber.begin.uc_stack.ss_size = fiber.stack.size();
                makecontext(&fiber.begin, run_thread, 0);
            }
            for (bool left = true; left;) {
                left = false;
                for (current = 0; current < threads; current++) {
                    if (fibers[current].done) continue;
                    left = true, threadIdx.x = current;
                    resume();
                }
            }
        }
}
