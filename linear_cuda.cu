// y = x @ W.T for one to eight rows of x, on Hopper and newer; see kernels_cuda.py, which compiles and launches it.
//
// A memory bus is kept busy by requests that never wait for arithmetic. One block a multiprocessor takes a share of W's
// rows. One of its warps does nothing but send for them, by tensor copies into a ring of stages in shared memory (16
// rows of W, CHUNK bytes of each); it does not wait for x, so that the first stages are under way while the kernel
// before this one ends (programmatic dependent launch). Another one adds up and stores what the eight others multiply.
//
// Those multiply on tensor cores, weights as the tall operand: the stage's 16 rows by x's 8 columns. Sums do not care
// about the order of columns of W, so that each thread takes 16 neighbouring bytes of a row, and x lies in shared memory
// in the order that this gives; where x is too large, a panel of its columns at a time. fp8, int8 and int4 become fp16,
// exactly, by moving their bits. x does too, times a power of two that brings the largest of a row to 2^14: bf16 has
// fewer digits than fp16, so that this is exact as well, but for what is 2^28 times smaller than the largest.
//
// Each instruction costs more for being fetched than for being executed, where a kernel runs for 5 microseconds:
// what is not the inner loop is written to be short.
//
// Set at compilation: KIND (0 bf16, 1 fp8 e4m3, 2 int8, 3 int4), GROUP (of int4, else any), ROOM (rows of x it has
// room for), CHUNK. Sources: PTX ISA (mma.m16n8k16, cp.async.bulk, mbarrier, griddepcontrol).

typedef unsigned int u32;
typedef unsigned char u8;
typedef unsigned short u16;
typedef long long i64;
struct alignas(64) TensorMap { u8 opaque[128]; };

constexpr int WARPS = 8, THREADS = WARPS * 32;     // that multiply; one more sends for weights, one finishes sums
constexpr int ROWS = 16, HALF = 8 * CHUNK;         // rows of W in a stage, and bytes of eight of them
constexpr int COLUMNS = KIND == 0 ? CHUNK / 2 : KIND == 3 ? CHUNK * 2 : CHUNK;  // in a chunk
constexpr int BOXES = KIND == 3 ? CHUNK * 2 / GROUP / 8 : 0;  // of 8 scales and zeros for 8 rows of W
constexpr int STAGE = 2 * HALF + 2 * BOXES * 256;
constexpr int CHAINS = KIND == 0 ? 2 : 4;          // of products that wait for one another
// int4: with few rows of x, several blocks of 32 columns get columns of their own in one accumulator.
constexpr int SLOTS = KIND == 3 ? 8 / ROOM : 1;
constexpr int TEAM = WARPS / ROOM;                 // warps that prepare a row of x
constexpr float FP8 = 256;                         // e4m3's bits in fp16's places are worth a 256th

__device__ __forceinline__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void set_up(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void wait_for(u32 barrier, u32 phase) {
    asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra again; }"
                 :: "r"(barrier), "r"(phase) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier, int lane) {  // once a warp, for all of its lanes
    __syncwarp();
    if (lane == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}

__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void consumers_meet() { asm volatile("bar.sync 1, %0;" :: "n"(THREADS) : "memory"); }

__device__ __forceinline__ void copy(u32 to, const TensorMap* map, int row, int block, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
                 :: "r"(to), "l"(map), "r"(0), "r"(row), "r"(block), "r"(barrier) : "memory");
}

__device__ __forceinline__ void copy(void* to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(address(to)), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// From L2: L1 may remember an earlier kernel's buffer.
__device__ __forceinline__ u16 load_fresh(const u16* p) { u16 v; asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(p)); return v; }
__device__ __forceinline__ uint4 load_fresh(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

__device__ __forceinline__ float low_bf16(u32 v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high_bf16(u32 v) { return __uint_as_float(v & 0xFFFF0000); }
__device__ __forceinline__ u16 to_bf16(float v) { u16 r; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v)); return r; }
__device__ __forceinline__ float fp16(u32 v) { float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"((u16)v)); return r; }
__device__ __forceinline__ u32 two(float low, float high) {  // in the format of x in shared memory
    u32 r;
    if (KIND == 0) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

__device__ __forceinline__ float max_nan(float a, float b) {
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}

__device__ __forceinline__ void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if (KIND == 0)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four bytes as two pairs of fp16. int8: in order; 1024 + byte is 0x6400 | byte. fp8: bytes (0, 2) and (1, 3).
__device__ __forceinline__ void unpack(u32 q, u32& a, u32& b) {
    if constexpr (KIND == 1) {
        a = ((q << 8) & 0x80008000) | ((q << 7) & 0x3F803F80);
        b = (q & 0x80008000) | ((q >> 1) & 0x3F803F80);
    } else {
        q ^= 0x80808080;
        asm("sub.f16x2 %0, %1, %2;" : "=r"(a) : "r"(__byte_perm(q, 0x64646464, 0x4140)), "r"(0x64806480));
        asm("sub.f16x2 %0, %1, %2;" : "=r"(b) : "r"(__byte_perm(q, 0x64646464, 0x4342)), "r"(0x64806480));
    }
}

// Eight nibbles as pairs of fp16: columns (0, 4), (1, 5), (2, 6) and (3, 7), in order of memory. 1024 more than they are,
// the odd ones 16 times as large and then 1024 more: who knows the sum of x can take that away from a sum of products.
__device__ __forceinline__ void nibbles(u32 q, u32 (&out)[4]) {
    out[0] = (q & 0x000F000F) | 0x64006400, out[1] = (q & 0x00F000F0) | 0x64006400;
    q >>= 8;
    out[2] = (q & 0x000F000F) | 0x64006400, out[3] = (q & 0x00F000F0) | 0x64006400;
}

__device__ __forceinline__ float activated(float v, int activation) {
    if (activation == 1) return v / (1 + __expf(-v));  // silu
    if (activation == 2) return v * (1 - 1 / (__expf(1.5957691216057308f * (v + 0.044715f * v * v * v)) + 1));  // tanh gelu
    return 0.5f * v * (1 + erff(v * 0.7071067811865476f));
}

// The i-th tile of a block: outputs n ... n + rows - 1. Blocks take tiles in turn, so that what is read at a time is
// close together; what does not go round is cut evenly.
struct Tile { int n, rows; };

__device__ __forceinline__ Tile tile_at(int i, int N, int step) {
    const int blocks = gridDim.x, rounds = N / (step * blocks), block = blockIdx.x;
    if (i < rounds) return {(i * blocks + block) * step, step};
    const int rest = N - rounds * step * blocks, first = rest * block / blocks;
    return {rounds * step * blocks + first, i > rounds ? 0 : rest * (block + 1) / blocks - first};
}

struct Ring {  // of stages of weights, as its writer or a reader goes round it
    u32 full, empty;
    int size, stage, parity;
    __device__ __forceinline__ void next() { if (++stage == size) stage = 0, parity ^= 1; }
    __device__ __forceinline__ void release(int lane) { arrive(empty + stage * 8, lane), next(); }
};

// By the warp that sends for weights. A tile without rows is the end of a panel. taken: tiles of all blocks so far,
// where whoever is faster takes more of them, and blocks that have ended; zero before and after. Else an even share.
__device__ __forceinline__ void send(Ring ring, const TensorMap& w, const TensorMap& scale_zero, u8* shared, Tile* tile_of,
                                     int N, int step, bool pairs, int chunks, int a_panel, int panels, u32* taken) {
    for (int panel = 0; panel < panels; panel++) {
        const int first = panel * a_panel, count = min(a_panel, chunks - first);
        int ticket = blockIdx.x;
        for (int i = 0;; i++) {
            const Tile tile = taken ? Tile{ticket * step, max(min(step, N - ticket * step), 0)} : tile_at(i, N, step);
            const int second = pairs ? N + tile.n : tile.n + 8;
            const bool both = tile.rows && (pairs || tile.rows > 8);
            if (taken && tile.rows) ticket = gridDim.x + atomicAdd(taken, 1);
            // Blocks go round a row from different chunks on: together they read all memory channels.
            for (int k = 0, chunk = blockIdx.x % count; k < count; k++, chunk = chunk + 1 < count ? chunk + 1 : 0) {
                const u32 barrier = ring.full + ring.stage * 8, to = address(shared + ring.stage * STAGE);
                wait_for(ring.empty + ring.stage * 8, ring.parity ^ 1);
                tile_of[ring.stage] = tile;
                ring.next();
                expect(barrier, both ? STAGE : tile.rows ? STAGE / 2 : 0);
                if (!tile.rows) break;
                copy(to, &w, tile.n, (first + chunk) * (CHUNK / 128), barrier);
                if (both) copy(to + HALF, &w, second, (first + chunk) * (CHUNK / 128), barrier);
                if (KIND == 3) {
                    copy(to + 2 * HALF, &scale_zero, tile.n, (first + chunk) * BOXES, barrier);
                    if (both) copy(to + 2 * HALF + BOXES * 256, &scale_zero, second, (first + chunk) * BOXES, barrier);
                }
            }
            if (!tile.rows) break;
        }
    }
    if (taken && atomicAdd(taken + 1, 1) == gridDim.x - 1) taken[0] = taken[1] = 0;
}

// By the warp that adds up what the others have summed, and stores outputs.
__device__ __forceinline__ void finish(Ring ring, const Tile* tile_of, const float* parts, const float* units, float* totals,
                                       u32 summed, const float* scale, const u16* bias, const u16* residual, u16* y, int M, int N,
                                       int step, int activation, int chunks, int a_panel, int panels) {
    const int lane = threadIdx.x % 32, r = lane % ROWS;
    const bool pairs = activation != 0;
    constexpr int EACH = ROOM == 1 ? 1 : ROOM / 2;
    asm volatile("griddepcontrol.wait;" ::: "memory");
    int turn = 0;
    for (int panel = 0; panel < panels; panel++)
        for (int i = 0;; i++, turn++) {
            wait_for(ring.full + ring.stage * 8, ring.parity);
            const Tile tile = tile_of[ring.stage];
            ring.release(lane);
            if (!tile.rows) break;
            // What is needed in the end is under way while others multiply.
            const int out = tile.n + r % step;
            const bool exists = r % step < tile.rows && (pairs || r < tile.rows);
            const i64 row = pairs && r >= step ? N + out : out;
            float s = 1, b = 0, rest[EACH];
            if (exists && panel == panels - 1) {
                if (KIND == 1 || KIND == 2) s = scale[row] * (KIND == 1 ? FP8 : 1);
                if (bias) b = low_bf16(bias[row]);
                #pragma unroll
                for (int j = 0; j < EACH; j++) {
                    const int m = lane / ROWS + 2 * j;
                    rest[j] = residual && m < M ? low_bf16(load_fresh(residual + (i64)m * N + out)) : 0;
                }
            }
            for (int k = 1; k < min(a_panel, chunks - panel * a_panel); k++) {
                wait_for(ring.full + ring.stage * 8, ring.parity);
                ring.release(lane);
            }
            wait_for(summed + turn % 2 * 8, turn / 2 % 2);
            #pragma unroll
            for (int j = 0; j < EACH; j++) {
                const int m = ROOM == 1 ? 0 : lane / ROWS + 2 * j;
                float value = 0;
                for (int k = 0; k < WARPS; k++) value += parts[((turn % 2 * WARPS + k) * ROWS + r) * ROOM + m];
                if (KIND) value *= units[panel * ROOM + min(m, M - 1)];
                if (panels > 1) {
                    float* total = totals + (i * ROWS + r) * ROOM + m;
                    if (panel > 0) value += *total;
                    if (panel < panels - 1) {
                        *total = value;
                        continue;
                    }
                }
                value = value * s + b;
                const float up = __shfl_down_sync(~0u, value, 8);
                if (pairs) value = activated(value, activation) * up;
                if (exists && m < M && !(pairs && r >= step) && lane < (ROOM == 1 ? ROWS : 32))
                    y[(i64)m * N + out] = to_bf16(value + rest[j]);
            }
            arrive(summed + 16 + turn % 2 * 8, lane);
        }
}

extern "C" __global__ void __launch_bounds__(THREADS + 64, 1)
linear(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap scale_zero, const float* __restrict__ scale,
       const u16* x, const u16* __restrict__ bias, const u16* __restrict__ norm, const u16* residual,
       u16* __restrict__ y, int M, int N, int K, float eps, float offset, int activation, int stages, int panels,
       u32* taken) {
    extern __shared__ __align__(1024) u8 shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int chunks = (K + COLUMNS - 1) / COLUMNS, a_panel = (chunks + panels - 1) / panels;
    const int columns = a_panel * COLUMNS, x_pitch = 2 * columns + 16, spans = columns / 32;
    const bool pairs = activation != 0;                                                  // rows of gate, and of up
    const int step = pairs ? ROWS / 2 : ROWS;
    u8* xs = shared + stages * STAGE;
    u8* norms = xs + M * x_pitch;                                                        // of the panel's columns
    float2* sums = (float2*)(norms + (norm ? 2 * columns : 0));                          // int4: [M][spans]
    float* parts = (float*)(sums + (KIND == 3 ? M * spans : 0));                         // [2][WARPS][ROWS][ROOM]
    float* units = parts + 2 * WARPS * ROWS * ROOM;                                      // [panels][ROOM]: what x was divided by
    float2* met = (float2*)(units + panels * ROOM + (panels & ROOM & 1));                                           // what warps found of rows of x
    float* totals = (float*)(met + WARPS);                                               // [tiles][ROWS][ROOM]
    Tile* tile_of = (Tile*)(totals + (panels > 1 ? (N / (step * gridDim.x) + 1) * ROWS * ROOM : 0));  // by stage
    const u32 full = address(tile_of + stages), empty = full + stages * 8;
    const u32 summed = empty + stages * 8, x_here = summed + 32;                         // two tiles in turn; finished

    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; i++) set_up(full + i * 8, 1), set_up(empty + i * 8, WARPS + 1);
        for (int i = 0; i < 2; i++) set_up(summed + i * 8, WARPS), set_up(summed + 16 + i * 8, 1);
        set_up(x_here, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    Ring ring{full, empty, stages, 0, 0};
    if (warp == WARPS) {
        if (lane == 0) send(ring, w, scale_zero, shared, tile_of, N, step, pairs, chunks, a_panel, panels, taken);
        return;
    }
    if (warp > WARPS) {
        finish(ring, tile_of, parts, units, totals, summed, scale, bias, residual, y, M, N, step, activation, chunks, a_panel, panels);
        return;
    }

    const int row = warp / TEAM, member = warp % TEAM * 32 + lane;  // of x, to prepare
    const bool mine = (KIND == 3 ? g % ROOM : g) < M;               // this thread's column of x exists
    float inv = 1;
    int turn = 0;
    for (int panel = 0; panel < panels; panel++) {
        const int count = min(a_panel, chunks - panel * a_panel), first = panel * columns;
        const int items = min(columns, K - first) / 8;              // of a row of x: eight columns
        if (panel) {  // all are done with the panel before
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            consumers_meet();
        }
        if (threadIdx.x == 0) {
            expect(x_here, (M + (norm != 0)) * items * 16);
            if (norm) copy(norms, norm + first, items * 16, x_here);
        }
        if (panel == 0) {
            // From here on the kernel before this one is complete; the next one may start, and send for its weights.
            asm volatile("griddepcontrol.wait; griddepcontrol.launch_dependents;" ::: "memory");
        }
        if (threadIdx.x == 0)
            for (int m = 0; m < M; m++) copy(xs + m * x_pitch, x + (i64)m * K + first, items * 16, x_here);
        if (row < M)  // there are no weights for what is beyond K, but it is multiplied
            for (int i = items + member; i < columns / 8; i += TEAM * 32) {
                *(uint4*)(xs + row * x_pitch + i * 16) = make_uint4(0, 0, 0, 0);
                if (KIND == 3) sums[row * spans + i / 4] = make_float2(0, 0);
            }
        float squares = 0, top = 0;
        if (norm && panels > 1 && panel == 0 && row < M)
            for (int i = member; i < K / 8; i += TEAM * 32) {
                const uint4 v = load_fresh((const uint4*)(x + (i64)row * K) + i);
                const u32 raw[4] = {v.x, v.y, v.z, v.w};
                for (int k = 0; k < 4; k++) squares += low_bf16(raw[k]) * low_bf16(raw[k]) + high_bf16(raw[k]) * high_bf16(raw[k]);
            }
        wait_for(x_here, panel & 1);
        if (KIND || norm) {
            if (row < M)
                #pragma unroll 1
                for (int i = member; i < items; i += TEAM * 32) {
                    const uint4 v = *(const uint4*)(xs + row * x_pitch + i * 16);
                    uint4 n = make_uint4(0, 0, 0, 0);
                    if (norm) n = *(const uint4*)(norms + i * 16);
                    const u32 raw[4] = {v.x, v.y, v.z, v.w}, weight[4] = {n.x, n.y, n.z, n.w};
                    #pragma unroll
                    for (int k = 0; k < 4; k++) {
                        const float a = low_bf16(raw[k]), b = high_bf16(raw[k]);
                        if (panels == 1) squares += a * a + b * b;
                        if (KIND) {
                            const float c = norm ? low_bf16(weight[k]) + offset : 1, d = norm ? high_bf16(weight[k]) + offset : 1;
                            top = max_nan(top, max_nan(fabsf(a * c), fabsf(b * d)));
                        }
                    }
                }
            for (int d = 16; d; d /= 2) {
                squares += __shfl_xor_sync(~0u, squares, d);
                top = max_nan(top, __shfl_xor_sync(~0u, top, d));
            }
            if (lane == 0) met[warp] = make_float2(squares, top);
            consumers_meet();
            squares = top = 0;
            for (int k = row * TEAM; k < (row + 1) * TEAM; k++) squares += met[k].x, top = max_nan(top, met[k].y);
            if (norm && panel == 0) inv = rsqrtf(squares / K + eps);
            float factor = inv;
            if (KIND) {
                // 2^e is the largest power of two in the row: 2^(14 - e) makes it 2^14
                const u32 e = max(__float_as_uint(top * inv) & 0x7F800000, 27 * 0x00800000u);
                factor *= __uint_as_float((127 + 14 + 127) * 0x00800000u - e);
                if (member == 0 && row < M)
                    units[panel * ROOM + row] = __uint_as_float(top < __uint_as_float(0x7F800000) ? e - 14 * 0x00800000u : 0x7FC00000);
            }
            if (row < M)
                #pragma unroll 1
                for (int i = member; i < items; i += TEAM * 32) {
                    uint4* at = (uint4*)(xs + row * x_pitch + i * 16);
                    uint4 n = make_uint4(0, 0, 0, 0);
                    if (norm) n = *(const uint4*)(norms + i * 16);
                    const u32 raw[4] = {at->x, at->y, at->z, at->w}, weight[4] = {n.x, n.y, n.z, n.w};
                    float a[8];
                    #pragma unroll
                    for (int k = 0; k < 4; k++) {
                        a[2 * k] = low_bf16(raw[k]) * factor, a[2 * k + 1] = high_bf16(raw[k]) * factor;
                        if (norm) a[2 * k] *= low_bf16(weight[k]) + offset, a[2 * k + 1] *= high_bf16(weight[k]) + offset;
                    }
                    if constexpr (KIND == 3) {  // as `nibbles` gives columns, the odd ones of them 16 times too large
                        const u32 h[4] = {two(a[0], a[4]), two(a[1] / 16, a[5] / 16), two(a[2], a[6]), two(a[3] / 16, a[7] / 16)};
                        float even = fp16(h[0]) + fp16(h[0] >> 16) + fp16(h[2]) + fp16(h[2] >> 16);
                        float odd = fp16(h[1]) + fp16(h[1] >> 16) + fp16(h[3]) + fp16(h[3] >> 16);
                        for (int d = 1; d < 4; d *= 2) even += __shfl_xor_sync(~0u, even, d), odd += __shfl_xor_sync(~0u, odd, d);
                        if (lane % 4 == 0) sums[row * spans + i / 4] = make_float2(1024 * (even + odd), even + 16 * odd);
                        *at = make_uint4(h[0], h[1], h[2], h[3]);
                    } else if constexpr (KIND == 1)
                        *at = make_uint4(two(a[0], a[2]), two(a[1], a[3]), two(a[4], a[6]), two(a[5], a[7]));
                    else
                        *at = make_uint4(two(a[0], a[1]), two(a[2], a[3]), two(a[4], a[5]), two(a[6], a[7]));
                }
        }
        consumers_meet();

        for (;; turn++) {
            float c[CHAINS][4] = {}, sum[4] = {};
            wait_for(ring.full + ring.stage * 8, ring.parity);
            const bool end = tile_of[ring.stage].rows == 0;
            for (int k = 0, chunk = blockIdx.x % count; k < (end ? 0 : count); k++, chunk = chunk + 1 < count ? chunk + 1 : 0) {
                if (k) wait_for(ring.full + ring.stage * 8, ring.parity);
                #pragma unroll
                for (int block0 = 0; block0 < CHUNK / 128; block0 += WARPS) {
                    const int block = block0 + warp, column = chunk * COLUMNS + block * (COLUMNS * 128 / CHUNK);
                    const u8* stage = shared + ring.stage * STAGE;
                    const u8* ws = stage + block * 1024 + g * 128;
                    if constexpr (KIND == 3) {
                        #pragma unroll
                        for (int j0 = 0; j0 < 8; j0 += SLOTS) {
                            float dot[2][4] = {};
                            uint4 v = make_uint4(0, 0, 0, 0);
                            if (mine) v = *(const uint4*)(xs + g % ROOM * x_pitch + 2 * (column + 32 * (j0 + g / ROOM)) + 16 * t);
                            #pragma unroll
                            for (int j = 0; j < SLOTS; j++) {
                                const u32 lo = *(const u32*)(ws + ((j0 + j) ^ g) * 16 + 4 * t);
                                const u32 hi = *(const u32*)(ws + HALF + ((j0 + j) ^ g) * 16 + 4 * t);
                                const bool here = SLOTS == 1 || g / ROOM == j;
                                u32 l[4], h[4];
                                nibbles(lo, l), nibbles(hi, h);
                                mma(dot[0], l[0], h[0], l[1], h[1], here ? v.x : 0, here ? v.y : 0);
                                mma(dot[1], l[2], h[2], l[3], h[3], here ? v.z : 0, here ? v.w : 0);
                            }
                            #pragma unroll
                            for (int i = 0; i < 2; i++) {
                                const int slot = j0 + (2 * t + i) / ROOM, group = (block * 8 + slot) * 32 / GROUP;
                                const u8* ss = stage + 2 * HALF + group / 8 * 256 + g * 32 + ((group / 4 & 1) ^ (g / 4)) * 16 + group % 4 * 4;
                                const u32 s_lo = *(const u32*)ss, s_hi = *(const u32*)(ss + BOXES * 256);
                                const float2 x_sum = sums[min((2 * t + i) % ROOM, M - 1) * spans + column / 32 + slot];
                                sum[i] += fp16(s_lo) * (dot[0][i] + dot[1][i] - x_sum.x - fp16(s_lo >> 16) * x_sum.y);
                                sum[2 + i] += fp16(s_hi) * (dot[0][2 + i] + dot[1][2 + i] - x_sum.x - fp16(s_hi >> 16) * x_sum.y);
                            }
                        }
                    } else {
                        #pragma unroll
                        for (int u = 0; u < 2; u++) {
                            const uint4 lo = *(const uint4*)(ws + ((2 * t + u) ^ g) * 16);
                            const uint4 hi = *(const uint4*)(ws + HALF + ((2 * t + u) ^ g) * 16);
                            const u8* at = xs + g * x_pitch + 2 * column + (2 * t + u) * (KIND == 0 ? 16 : 32);
                            uint4 v[2] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
                            if (mine) v[0] = *(const uint4*)at;
                            if constexpr (KIND == 0) {
                                mma(c[0], lo.x, hi.x, lo.y, hi.y, v[0].x, v[0].y);
                                mma(c[1], lo.z, hi.z, lo.w, hi.w, v[0].z, v[0].w);
                            } else {
                                if (mine) v[1] = *(const uint4*)(at + 16);
                                const u32 l[4] = {lo.x, lo.y, lo.z, lo.w}, h[4] = {hi.x, hi.y, hi.z, hi.w};
                                const u32 b[8] = {v[0].x, v[0].y, v[0].z, v[0].w, v[1].x, v[1].y, v[1].z, v[1].w};
                                #pragma unroll
                                for (int j = 0; j < 4; j++) {
                                    u32 l0, l1, h0, h1;
                                    unpack(l[j], l0, l1), unpack(h[j], h0, h1);
                                    mma(c[j], l0, h0, l1, h1, b[2 * j], b[2 * j + 1]);
                                }
                            }
                        }
                    }
                }
                ring.release(lane);
            }
            if (end) {
                ring.release(lane);
                break;
            }
            // Warps took different columns: their sums meet in shared memory, in two places in turn.
            if constexpr (KIND != 3) {
                for (int i = 0; i < 4; i++)
                    for (int j = 0; j < CHAINS; j++) sum[i] += c[j][i];
            } else {
                if (ROOM == 1) sum[0] += sum[1], sum[2] += sum[3];
                for (int d = ROOM == 1 ? 1 : ROOM / 2; d < 4; d *= 2)
                    for (int i = 0; i < 4; i++) sum[i] += __shfl_xor_sync(~0u, sum[i], d);
            }
            wait_for(summed + 16 + turn % 2 * 8, turn / 2 % 2 ^ 1);
            float* own = parts + (turn % 2 * WARPS + warp) * ROWS * ROOM;
            for (int i = 0; i < 2; i++)
                if (2 * t + i < ROOM) own[g * ROOM + 2 * t + i] = sum[i], own[(g + 8) * ROOM + 2 * t + i] = sum[2 + i];
            arrive(summed + turn % 2 * 8, lane);
        }
    }
}
