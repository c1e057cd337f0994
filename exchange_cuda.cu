// The sum of a small tensor over GPUs that can write to each other's memory, or all of them side by side; see
// kernels_cuda.py, which compiles and launches it.
//
// Every GPU writes its part into the memory of all others, as words of 4 bytes of data and 4 that say which exchange
// they belong to (a store of 8 bytes arrives as a whole), and reads its own memory until theirs are there. So there is no
// barrier before or after, and one way over NVLink is all that is waited for. Two parts of memory are used in turn: a rank
// sends words of exchange n + 1 after its own exchange n has ended, and so after it has read all words of n; who has
// words of n + 1 from all others may write n + 2 where n was.
//
// A linear (linear_cuda.cu) writes such words itself, of a float32 each, into its own GPU's memory too; `collect` then reads
// what all have written.
//
// Sums are in float32, in the order of ranks: the same bits on each GPU. All GPUs must make the same exchanges in the
// same order. Source: the idea of NCCL's low-latency protocol
// (https://github.com/NVIDIA/nccl/issues/765).

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int MAX_WORLD = 8;
struct Memory { u64 of[MAX_WORLD]; };  // of each rank: [2][world][room] pieces of two words

__device__ __forceinline__ u32 load_now(const u32* p) {
    u32 v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
__device__ __forceinline__ ulonglong2 load_now(u64 p) {
    ulonglong2 v;
    asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(v.x), "=l"(v.y) : "l"(p));
    return v;
}
__device__ __forceinline__ void store_now(u64 p, ulonglong2 v) {
    asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" :: "l"(p), "l"(v.x), "l"(v.y) : "memory");
}
__device__ __forceinline__ uint2 load_fresh(const uint2* p) {  // from L2: L1 may remember an earlier kernel's buffer
    uint2 v;
    asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}
__device__ __forceinline__ u32 two_bf16(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
// Where a GPU can overlap kernels. This one lets the next one start at once, to send for its weights meanwhile: before its
// own wait that one may only read what is constant, since the kernel before this one may not have ended.
__device__ __forceinline__ void let_next_start_and_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents; griddepcontrol.wait;" ::: "memory");
#endif
}

// By the last block that ends an exchange, whose number all of them have read: the next one's.
__device__ __forceinline__ void end_turn(u32* state, u32 turn) {
    __syncthreads();
    if (threadIdx.x == 0 && atomicAdd(state + 1, 1) == gridDim.x - 1) {
        state[1] = 0;
        state[0] = turn + 1 ? turn + 1 : 2;  // memory that was never written to holds zeros
    }
}

// x: n pieces of 8 bytes, a thread each. y: their sum, or if `gather` those of each rank. state: the number of this
// exchange, from 1 on, and blocks that have ended it, zero before and after. BF16: what is summed; else float32.
extern "C" __global__ void __launch_bounds__(256)
exchange(const uint2* __restrict__ x, uint2* __restrict__ y, const __grid_constant__ Memory memory, int rank, int world,
         int n, int room, int gather, u32* state) {
    let_next_start_and_wait();
    const u32 turn = load_now(state);
    const int i = blockIdx.x * 256 + threadIdx.x;
    if (i < n) {
        const uint2 mine = load_fresh(x + i);
        const auto place = [&](int reader, int writer) {
            return memory.of[reader] + (((u64)(turn & 1) * world + writer) * room + i) * 16;
        };
        for (int d = 1; d < world; d++)  // not all to the same one at first
            store_now(place((rank + d) % world, rank), make_ulonglong2((u64)turn << 32 | mine.x, (u64)turn << 32 | mine.y));
        float sum[4] = {};
        for (int r = 0; r < world; r++) {
            uint2 v = mine;
            if (r != rank) {
                ulonglong2 words;
                do words = load_now(place(rank, r)); while (words.x >> 32 != turn || words.y >> 32 != turn);
                v = make_uint2((u32)words.x, (u32)words.y);
            }
            if (gather) y[(u64)r * n + i] = v;
            else if (BF16) {
                sum[0] += __uint_as_float(v.x << 16), sum[1] += __uint_as_float(v.x & 0xFFFF0000);
                sum[2] += __uint_as_float(v.y << 16), sum[3] += __uint_as_float(v.y & 0xFFFF0000);
            } else sum[0] += __uint_as_float(v.x), sum[1] += __uint_as_float(v.y);
        }
        if (!gather && BF16) y[i] = make_uint2(two_bf16(sum[0], sum[1]), two_bf16(sum[2], sum[3]));
        else if (!gather) y[i] = make_uint2(__float_as_uint(sum[0]), __float_as_uint(sum[1]));
    }
    end_turn(state, turn);
}

// y = residual + the sum over ranks of what the linear right before it writes into the memory of all: n pairs of bf16, a
// thread each. It does not wait for the end of that linear, for which it needs that
// - the linear lets it start only after its own wait: all before the linear has ended, and `state` is this exchange's;
// - the linear writes nothing but words, and this GPU's are among those that are waited for: when this ends, what is left
//   of the linear are blocks that only have to exit;
// - all other kernels wait, so that none writes to what these two read, or reads y, before this has ended.
extern "C" __global__ void __launch_bounds__(256)
collect(const u32* __restrict__ residual, u32* __restrict__ y, const __grid_constant__ Memory memory, int rank, int world,
        int n, int room, u32* state) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
    const u32 turn = load_now(state);
    const int i = blockIdx.x * 256 + threadIdx.x;
    if (i < n) {
        const u32 rest = load_now(residual + i);
        float low = 0, high = 0;
        for (int r = 0; r < world; r++) {
            ulonglong2 words;
            do words = load_now(memory.of[rank] + (((u64)(turn & 1) * world + r) * room + i) * 16);
            while (words.x >> 32 != turn || words.y >> 32 != turn);
            low += __uint_as_float((u32)words.x), high += __uint_as_float((u32)words.y);
        }
        y[i] = two_bf16(low + __uint_as_float(rest << 16), high + __uint_as_float(rest & 0xFFFF0000));
    }
    end_turn(state, turn);
}
