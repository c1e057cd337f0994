// y = x @ W.T for one to eight rows of x, on Hopper and newer; see kernels_cuda.py, which compiles and launches it.
//
// A memory bus is kept busy by requests that never wait for arithmetic. One block a multiprocessor takes a share of W's
// rows. One of its warps does nothing but send for them, by tensor copies into a ring of stages in shared memory (16
// rows of W, CHUNK bytes of each); it does not wait for x, so that the first stages are under way while the kernel
// before this one ends (programmatic dependent launch). Where there are many rows, whoever is faster takes more.
//
// Other warps multiply on tensor cores, weights as the tall operand: the stage's 16 rows by x's 8 columns. Sums do not
// care about the order of columns of W, so that each thread takes 16 neighbouring bytes of a row, and x lies in shared
// memory in the order that this gives; where x is too large, a panel of its columns at a time. int8 and int4 are
// multiplied as integers, which saves turning them into floats: x becomes 15-bit integers relative to the largest of
// its 128 neighbours (int4: 32), two digits of 8 bits, each a column of its own. fp8 becomes fp16, and so does x, relative
// to the largest of 128. With many rows of x int4 becomes fp16, too: 1024 + q, whose last bits q is, or 1024 + 16 q, which
// saves a shift, by a sixteenth of x; sums of x tell what is too much in a group's products. Then each warp prepares the
// columns of x that it multiplies itself, and where a row of W is one chunk they stay in registers. One or two last warps
// add up what these leave for a tile of 16 rows, and store it, while they are at the next one: with many rows of x they
// have hardly time for it.
//
// Where x has several rows, to prepare it takes each block a while. Then two or four neighbouring blocks (a cluster) take
// the same rows of W, a part of the columns each, and so prepare a part of x; they finish tiles in turn, and send each
// other what the others' tiles lack.
//
// Set at compilation: KIND (0 bf16, 1 fp8 e4m3, 2 int8, 3 int4), GROUP (of int4, else any), ROOM (rows of x it has
// room for), CHUNK, WARPS (that multiply), ONE (whether a block's columns of a row of W are one chunk; only of int4: then x
// stays in registers), WORDS (of a row's scales and zeros, of int4, that are copied in one piece),
// SPLIT (1, or 2 or 4 blocks that share tiles), WORLD (1, or GPUs that add up what each of them has: y is then the words that
// exchange_cuda.cu reads, in the memory of all of them), EXPERTS (or a stack of matrices, one of them for each row of y: all
// rows are then one long one, whose tiles know theirs). Sources: PTX ISA (mma.m16n8k16 and k32, cp.async.bulk.tensor,
// mbarrier, griddepcontrol, mapa, st.async).

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned char u8;
typedef unsigned short u16;
struct alignas(64) TensorMap { u8 opaque[128]; };
struct Words { u64 of[8]; const u32* number; int rank, room; };  // as exchange_cuda.cu has them: memory of each rank
#ifndef EXPERTS
#define EXPERTS 0
#endif
// The matrix of each row of y; its outputs (a multiple of a tile's); rows of y that have one row of x in common; whether
// `of` is older than the kernel before this one.
struct Experts { const long long* of; int outputs, shared, early; };
struct Maps { TensorMap w[SPLIT], scale_zero[SPLIT]; };  // of each block of a cluster

constexpr int THREADS = WARPS * 32;                // that multiply; one more warp sends for weights, others finish sums
constexpr int ROWS = 16, HALF = 8 * CHUNK;         // rows of W in a stage, and bytes of eight of them
constexpr int SHARE = CHUNK / WARPS < 128 ? CHUNK / WARPS : 128;  // bytes of a row that a warp multiplies at a time: 64 or 128
constexpr int BLOCKS = CHUNK / SHARE / WARPS;      // of them in a chunk, that are a warp's
constexpr bool NIBBLES = KIND == 3 && ROOM == 8;   // int4 as fp16
constexpr bool HALVES = KIND < 2 || NIBBLES;       // x is of 16-bit numbers, and a row of it one of 8 columns
constexpr int CHAINS = 2;                          // of products that wait for one another
constexpr int TILES = !HALVES && ROOM > 4 ? 2 : 1;  // of 8 columns: a row of x is two of them, if it is integers
constexpr int BOX = WORDS * 32;                    // bytes of WORDS scales and zeros for 8 rows of W
constexpr int BOXES = KIND == 3 ? CHUNK * 2 / GROUP / WORDS : 0;
constexpr int STAGE = 2 * HALF + 2 * BOXES * BOX;
constexpr int FLIGHT = 4096 / CHUNK;               // stages that are sent for at a time: 64 KB keep its share of the bus busy
constexpr int X_BANK = KIND == 3 ? 32 : 16;        // a pitch that spreads what a warp reads at once over all banks
constexpr int SPAN = KIND == 3 ? 32 : 128;         // columns of x that share an exponent, or int4's sums
constexpr int FINISHERS = ROOM >= 4 ? 2 : 1;       // warps that finish sums, each for some of the rows of x
constexpr int EACH = ROOM == 1 ? 1 : ROOM / 2 / FINISHERS;  // sums of a tile that each lane finishes
constexpr int PLACES = SPLIT > 2 ? 2 : 4, OTHERS = SPLIT - 1;  // for sums that each of the other blocks of a cluster sends
constexpr int GROUPS = ROOM == 1 ? 1 : 2;          // of warps, that prepare different rows of x
// int4, one row of x: threads t = 0 ... 3 of a row of W have different groups, whose sums land in different columns, since
// x is a block diagonal. int4, two rows: two blocks of 32 columns get columns of their own in one accumulator.
constexpr int PLANES = KIND != 3 ? 8 : ROOM >= 4 ? 8 : 2 * ROOM, SLOTS = 8 / PLANES, BATCHES = KIND == 3 ? SHARE / 16 / SLOTS : 1;
constexpr bool FOURS = GROUP == 32 && SLOTS == 1;  // a thread's groups are neighbours: four scales and zeros at a time

__device__ __forceinline__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void wait_for(u32 barrier, u32 phase) {
    asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra again; }"
                 :: "r"(barrier), "r"(phase) : "memory");
}

__device__ __forceinline__ void set_up(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier, int lane) {  // once a warp, for all of its lanes
    __syncwarp();
    if (lane == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}

// Of another block of a cluster: an address in its shared memory; a word stored there, of which a barrier there is told.
__device__ __forceinline__ u32 at_other(u32 mine, int part) {
    u32 r;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(mine), "r"(part));
    return r;
}
__device__ __forceinline__ void send_other(u32 to, float v, u32 barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
                 :: "r"(to), "r"(__float_as_uint(v)), "r"(barrier) : "memory");
}
__device__ __forceinline__ void expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait_for_other(u32 barrier, u32 phase) {
    asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1; @!p bra again; }"
                 :: "r"(barrier), "r"(phase) : "memory");
}

__device__ __forceinline__ uint4 load_matrices(u32 at) {  // four, of 8 rows of 16 bytes: lane i has word i % 4 of row i / 4
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
    return v;
}

__device__ __forceinline__ void consumers_meet() { asm volatile("bar.sync 1, %0;" :: "n"(THREADS) : "memory"); }

__device__ __forceinline__ void copy(u32 to, const TensorMap* map, int row, int block, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
                 :: "r"(to), "l"(map), "r"(0), "r"(row), "r"(block), "r"(barrier) : "memory");
}

__device__ __forceinline__ u16 load_fresh(const u16* p) { u16 v; asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(p)); return v; }
__device__ __forceinline__ uint4 load_fresh(const uint4* p) {  // from L2: L1 may remember an earlier kernel's buffer
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

__device__ __forceinline__ u32 load_fresh(const u32* p) { u32 v; asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p)); return v; }

// Of an exchange over GPUs: the i-th value of this one, into the memory of all, its own too, with the exchange's number.
__device__ __forceinline__ void send_all(const Words& words, u32 number, u32 i, float v) {
    #pragma unroll
    for (int d = 0; d < WORLD; d++) {  // not all to the same one at first
        const u64 to = words.of[(words.rank + d) % WORLD] + (((number & 1) * WORLD + words.rank) * 2ull * words.room + i) * 8;
        asm volatile("st.relaxed.sys.global.u64 [%0], %1;" :: "l"(to), "l"((u64)number << 32 | __float_as_uint(v)) : "memory");
    }
}

__device__ __forceinline__ float low_bf16(u32 v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high_bf16(u32 v) { return __uint_as_float(v & 0xFFFF0000); }
__device__ __forceinline__ u16 to_bf16(float v) { u16 r; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v)); return r; }
__device__ __forceinline__ float fp16(u32 v) { float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"((u16)v)); return r; }
__device__ __forceinline__ u32 two_bf16(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

__device__ __forceinline__ u32 multiply_bf16(u32 a, u32 b) {  // two products
    u32 r;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
__device__ __forceinline__ u32 max_bf16(u32 a, u32 b) {  // of two pairs, regardless of signs; nan, if there is one
    u32 r;
    asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

__device__ __forceinline__ float max_nan(float a, float b) {
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}

__device__ __forceinline__ void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(int* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if (KIND == 3)
        asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_fp16(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four e4m3 as two pairs of fp16: bytes (0, 1) and (2, 3).
__device__ __forceinline__ void unpack_fp8(u32 q, u32& first, u32& second) {
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.rn.f16x2.e4m3x2 %0, low; cvt.rn.f16x2.e4m3x2 %1, high; }"
        : "=r"(first), "=r"(second) : "r"(q));
}

// int4 as integers: four words of nibbles, even columns and then odd ones, by two digits of x.
__device__ __forceinline__ void mma_nibbles(int* dot, u32 lo, u32 hi, u32 b0, u32 b1) {
    mma(dot, lo & 0x0F0F0F0F, hi & 0x0F0F0F0F, (lo >> 4) & 0x0F0F0F0F, (hi >> 4) & 0x0F0F0F0F, b0, b1);
}
// What they have given for a group: the digits together, times x's unit, less the zero times x's sum, by the scale: of
// rows g and g + 8 of W, each of whose scale and zero are a word.
__device__ __forceinline__ void add_group(float* sum, const int* dot, const float2 unit, u32 s_lo, u32 s_hi) {
    const float d_lo = dot[0] + (dot[1] << 8), d_hi = dot[2] + (dot[3] << 8);
    sum[0] += fp16(s_lo) * (d_lo * unit.x - fp16(s_lo >> 16) * unit.y);
    sum[1] += fp16(s_hi) * (d_hi * unit.x - fp16(s_hi >> 16) * unit.y);
}

// Two nibbles of a word as fp16: 1024 more than they are, or, of those at the mask's upper bits, than 16 times that.
__device__ __forceinline__ u32 two_nibbles(u32 word, u32 mask) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(word), "r"(mask), "r"(0x64006400));  // and, or
    return r;
}
__device__ __forceinline__ u32 two_fp16(float low, float high) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// Without branches that few numbers take, so that neighbours are computed side by side.
template <int COUNT>
__device__ __forceinline__ void activate(float (&v)[COUNT], int activation) {
    if (activation == 1)  // silu
        for (int j = 0; j < COUNT; j++) v[j] = __fdividef(v[j], 1 + __expf(-v[j]));
    else if (activation == 2)  // tanh gelu
        for (int j = 0; j < COUNT; j++)
            v[j] *= 1 - __fdividef(1, __expf(1.5957691216057308f * (v[j] + 0.044715f * v[j] * v[j] * v[j])) + 1);
    else
        for (int j = 0; j < COUNT; j++) v[j] *= 0.5f * (1 + erff(v[j] * 0.7071067811865476f));
}

// The i-th tile of a block: outputs n ... n + rows - 1. Blocks take tiles in turn, so that what is read at a time is
// close together; what does not go round is cut evenly, but for experts, of whom a tile has one.
struct Tile { int n; short rows, chunk; };  // chunk: the one it begins with

__device__ __forceinline__ Tile tile_at(int i, int N, int step) {
    const int blocks = gridDim.x / SPLIT, rounds = N / (step * blocks), block = blockIdx.x / SPLIT;
    if (EXPERTS) {  // a tile is of one of them
        const int n = (i * blocks + block) * step;
        return {n, (short)max(min(step, N - n), 0)};
    }
    if (i < rounds) return {(i * blocks + block) * step, (short)step};
    const int rest = N - rounds * step * blocks, first = rest * block / blocks;
    return {rounds * step * blocks + first, (short)(i > rounds ? 0 : rest * (block + 1) / blocks - first)};
}

// Where in W the rows of outputs are, of which `whole` have gates first, and then what these gate.
struct Rows {
    const u32* matrix;
    int whole, shared;
    __device__ __forceinline__ int at(int n, bool pairs) const {
        if (!EXPERTS) return n;
        const int row = n / whole;
        return matrix[row] * (pairs ? 2 * whole : whole) + n - row * whole;
    }
};

struct Ring {  // of stages of weights, as its writer or a reader goes round it
    u32 full, empty;
    int size, stage, parity;
    __device__ __forceinline__ void next() { if (++stage == size) stage = 0, parity ^= 1; }
    __device__ __forceinline__ void release(int lane) { arrive(empty + stage * 8, lane), next(); }
};

// By the warp that sends for weights. A tile without rows is the end of a panel. taken: tiles of all blocks so far,
// where whoever is faster takes more of them, and blocks that have ended; zero before and after. Else an even share.
__device__ __forceinline__ void send(Ring ring, const TensorMap& w, const TensorMap& scale_zero, u8* shared, Tile* tile_of,
                                     int N, int step, bool pairs, int chunks, int a_panel, int panels, u32* taken,
                                     const Rows& rows) {
    int sent = 0;
    for (int panel = 0; panel < panels; panel++) {
        const int first = panel * a_panel, count = min(a_panel, chunks - first);
        const auto send_tile = [&](Tile tile) {  // whether there was one
            const int row = EXPERTS && !tile.rows ? 0 : rows.at(tile.n, pairs), second = pairs ? rows.whole + row : row + 8;
            const bool both = tile.rows && (pairs || tile.rows > 8);
            // Neighbours go round a row from different chunks on: together they read all memory channels. And a tile's sums
            // are the same, whoever takes it.
            tile.chunk = tile.n / step % count;
            for (int k = 0, chunk = tile.chunk; k < count; k++, chunk = chunk + 1 < count ? chunk + 1 : 0) {
                const u32 barrier = ring.full + ring.stage * 8, to = address(shared + ring.stage * STAGE);
                wait_for(ring.empty + ring.stage * 8, ring.parity ^ 1);
                // Requests are served in order: had it sent for all, what other warps need would come after all of it.
                const int before = ring.stage - FLIGHT;
                if (sent++ >= FLIGHT)
                    wait_for(ring.full + (before < 0 ? before + ring.size : before) * 8, ring.parity ^ (before < 0));
                tile_of[ring.stage] = tile;
                ring.next();
                expect(barrier, both ? STAGE : tile.rows ? STAGE / 2 : 0);
                if (!tile.rows) break;
                copy(to, &w, row, (first + chunk) * (CHUNK / 128), barrier);
                if (both) copy(to + HALF, &w, second, (first + chunk) * (CHUNK / 128), barrier);
                if (KIND == 3) {
                    copy(to + 2 * HALF, &scale_zero, row, (first + chunk) * BOXES, barrier);
                    if (both) copy(to + 2 * HALF + BOXES * BOX, &scale_zero, second, (first + chunk) * BOXES, barrier);
                }
            }
            return tile.rows != 0;
        };
        if (!taken) {
            for (int i = 0; send_tile(tile_at(i, N, step)); i++);
            continue;
        }
        // Tickets are on their way while the tile before is sent for.
        const auto at_ticket = [&](int i) { return Tile{i * step, (short)max(min(step, N - i * step), 0)}; };
        const int blocks = gridDim.x;
        for (int even = blockIdx.x, odd = even + blocks;;) {
            if (!send_tile(at_ticket(even))) break;
            even = 2 * blocks + atomicAdd(taken, 1);
            if (!send_tile(at_ticket(odd))) break;
            odd = 2 * blocks + atomicAdd(taken, 1);
        }
    }
    __threadfence();  // the last ticket that was drawn, which nobody waited for, has been counted
    if (taken && atomicAdd(taken + 1, 1) == gridDim.x - 1) taken[0] = taken[1] = 0;
}

struct alignas(4 * EACH) Sums { float of[EACH]; };

// By a warp that adds up what the others have summed, and stores outputs. squares: those of x, of which the norm's factor
// is made; null without a norm.
__device__ __forceinline__ void finish(Ring ring, const Tile* tile_of, const float* parts, float* totals, u32 summed,
                                       const float* squares, const float* scale, const u16* bias, const u16* residual,
                                       u16* y, int M, int N, int K, float eps, int step, int activation, int chunks,
                                       int a_panel, int panels, float* from_other, u32 received, int part, const Words& words,
                                       const Rows& rows) {
    // Of a tile's sums [ROWS][ROOM] each lane has EACH neighbours; of one row of x there is one for half of the lanes.
    const int which = threadIdx.x / 32 - WARPS - 1, lane = threadIdx.x % 32;
    const int r = ROOM == 1 ? lane % ROWS : lane / 2, m0 = ROOM == 1 ? 0 : (2 * which + lane % 2) * EACH;
    const bool pairs = activation != 0;
    from_other += which * 32 * OTHERS * (PLACES * EACH + 1), received += which * PLACES * 8;
    float* squares_of_other = from_other + PLACES * OTHERS * EACH * 32;
    if constexpr (SPLIT > 1) {
        if (lane < PLACES) expect(received + lane * 8, OTHERS * (EACH + (squares && lane == 0)) * 128);
        asm volatile("barrier.cluster.wait.acquire;" ::: "memory");  // the others' barriers are set up
    }
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const u32 number = WORLD > 1 ? load_fresh(words.number) : 0;

    // Of the tile that is being finished; the total of squares of row lane / (32 / ROOM) of x, and the norm's factors.
    int out = 0, pending = -1, its_x = 0;
    bool exists = false;
    float s = 1, values[EACH], total = 0, factor[EACH];
    for (int j = 0; j < EACH; j++) factor[j] = 1;
    const float one_of_k = 1.0f / K;
    u32 b = 0, rest[EACH];  // bf16, as bits: to turn them into floats here would be to wait for them here
    const auto store = [&](int i) {
        float all = total;
        if constexpr (SPLIT > 1) {
            const int place = i / SPLIT % PLACES;
            wait_for_other(received + place * 8, i / SPLIT / PLACES % 2);
            #pragma unroll
            for (int o = 0; o < OTHERS; o++) {
                for (int j = 0; j < EACH; j++) values[j] += from_other[((place * OTHERS + o) * EACH + j) * 32 + lane];
                if (squares && i < SPLIT) all += squares_of_other[o * 32 + lane];
            }
            __syncwarp();
            if (lane == 0) expect(received + place * 8, OTHERS * EACH * 128);
        }
        if (squares && i < SPLIT) {
            const float inv = rsqrtf(all * one_of_k + eps);
            for (int j = 0; j < EACH; j++) factor[j] = __shfl_sync(~0u, inv, (m0 + j) * (32 / ROOM));
        }
        float value[EACH], up[EACH];
        #pragma unroll
        for (int j = 0; j < EACH; j++) value[j] = values[j] * (s * factor[j]) + low_bf16(b);
        if (pairs) {
            #pragma unroll
            for (int j = 0; j < EACH; j++) up[j] = __shfl_down_sync(~0u, value[j], ROOM == 1 ? 8 : 16);
            activate(value, activation);
            #pragma unroll
            for (int j = 0; j < EACH; j++) value[j] *= up[j];
        }
        const bool stores = exists && !(pairs && r >= step) && lane < (ROOM == 1 ? ROWS : 32);
        #pragma unroll
        for (int j = 0; j < EACH; j++) {
            const int m = m0 + j;
            if (stores && (EXPERTS ? m == its_x : m < M)) {
                if (EXPERTS) y[out] = to_bf16(value[j]);
                else if (WORLD > 1) send_all(words, number, m * N + out, value[j]);
                else y[(long long)m * N + out] = to_bf16(value[j] + low_bf16(rest[j]));
            }
        }
    };
    u32 turn = 0;
    for (int panel = 0; panel < panels; panel++)
        for (int i = 0;; i++, turn++) {
            wait_for(ring.full + ring.stage * 8, ring.parity);
            const Tile tile = tile_of[ring.stage];
            ring.release(lane);
            if (!tile.rows) break;
            const bool mine = i % SPLIT == part, last = panel == panels - 1;
            if (mine && last) {  // what is needed in the end is under way while others multiply
                out = tile.n + r % step;
                exists = r % step < tile.rows && (pairs || r < tile.rows);
                const int first = EXPERTS ? rows.at(tile.n, pairs) + r % step : out;
                const long long row = pairs && r >= step ? rows.whole + first : first;
                if (EXPERTS) its_x = tile.n / rows.whole / rows.shared;
                if (exists && (KIND == 1 || KIND == 2)) s = scale[row];
                if (exists && bias) b = bias[row];
                #pragma unroll
                for (int j = 0; j < EACH; j++) {
                    const int m = m0 + j;
                    rest[j] = 0;
                    if (residual && exists && m < M) rest[j] = load_fresh(residual + (long long)m * N + out);
                }
            }
            #pragma unroll 1
            for (int k = 1; k < min(a_panel, chunks - panel * a_panel); k++) {
                wait_for(ring.full + ring.stage * 8, ring.parity);
                ring.release(lane);
            }
            wait_for(summed + turn % 2 * 8, turn / 2 % 2);
            float sums[EACH] = {};
            const Sums* from = (const Sums*)(parts + (turn % 2 * WARPS * ROWS + r) * ROOM + m0);
            #pragma unroll
            for (int k = 0; k < WARPS; k++) {
                const Sums more = from[k * (ROWS * ROOM / EACH)];
                for (int j = 0; j < EACH; j++) sums[j] += more.of[j];
            }
            if (panels > 1)
                for (int j = 0; j < EACH; j++) {
                    float* sum = totals + (i * ROWS + r) * ROOM + m0 + j;
                    if (panel > 0) sums[j] += *sum;
                    __syncwarp();  // of one row both halves of the warp hold the same sums
                    if (ROOM > 1 || lane < ROWS) *sum = sums[j];
                }
            arrive(summed + 16 + turn % 2 * 8, lane);
            if (!last) continue;
            if (squares && i == 0) {
                constexpr int LANES = 32 / ROOM;
                for (int k = 0; k < WARPS; k++) total += squares[(lane / LANES * WARPS + k) * LANES + lane % LANES];
                for (int d = 1; d < LANES; d *= 2) total += __shfl_xor_sync(~0u, total, d);
            }
            if (mine)
                for (int j = 0; j < EACH; j++) values[j] = sums[j];
            if (SPLIT == 1) store(i);
            else if (mine) pending = i;  // the other's sums are under way while the next tile is multiplied
            else {
                // Has the block whose tile this is read this place, where sums of tile i - PLACES * SPLIT, i - 8, were? Of two blocks,
                // this one has stored its tile i - 3, for which the other had sent its sums after it had stored its own tile i - 6.
                // Of four, this one has stored its tile i - 5, i - 2 or i - 3, and that one, before it sent sums for it, i - 8 or
                // i - 4. (It sends sums of a tile before it stores a tile of its own that came right before.)
                const int whose = i % SPLIT, place = i / SPLIT % PLACES, o = part - (part > whose);
                const u32 to = at_other(address(from_other + (place * OTHERS + o) * EACH * 32 + lane), whose);
                const u32 barrier = at_other(received + place * 8, whose);
                for (int j = 0; j < EACH; j++) send_other(to + j * 128, sums[j], barrier);
                if (squares && i < SPLIT) send_other(at_other(address(squares_of_other + o * 32 + lane), whose), total, barrier);
                if (pending >= 0) store(pending), pending = -1;
            }
        }
    if (SPLIT > 1 && pending >= 0) store(pending);
}

// int4: what of x a thread multiplies with a batch of columns.
union X { u32 of[8]; uint2 two; uint4 four[2]; };  // as much of it as there is

constexpr int PIECES = ROOM == 1 ? 2 : 1;          // of eight neighbouring elements of x, that a thread turns at a time

// Neighbouring elements of a row of x (times the norm's weight, if there is one) into shared memory, as KIND wants them.
// All lanes of a warp call it, with neighbouring i.
__device__ __forceinline__ void put(u8* xs, float* units, int x_pitch, int m, int i, const uint4 (&v)[PIECES],
                                    const uint4 (&n)[PIECES], bool norm, float offset) {
    u32 raw[4 * PIECES];
    float a[8 * PIECES];
    #pragma unroll
    for (int j = 0; j < 4 * PIECES; j++) {
        raw[j] = ((const u32*)v)[j];
        a[2 * j] = low_bf16(raw[j]), a[2 * j + 1] = high_bf16(raw[j]);
        if (norm) {
            const u32 weight = ((const u32*)n)[j];
            a[2 * j] *= low_bf16(weight) + offset, a[2 * j + 1] *= high_bf16(weight) + offset;
            if (KIND == 0) raw[j] = two_bf16(a[2 * j], a[2 * j + 1]);
        }
    }
    if constexpr (KIND == 0) {
        #pragma unroll
        for (int p = 0; p < PIECES; p++) {
            *(uint4*)(xs + m * x_pitch + (i * PIECES + p) * 16) =
                make_uint4(raw[4 * p], raw[4 * p + 1], raw[4 * p + 2], raw[4 * p + 3]);
        }
    } else {
        constexpr int LANES = SPAN / 8 / PIECES;  // that share an exponent
        constexpr int BITS = KIND == 1 ? 14 : 13;
        float top = 0;
        #pragma unroll
        for (int j = 0; j < 8 * PIECES; j++) top = max_nan(top, fabsf(a[j]));
        for (int d = 1; d < LANES; d *= 2) top = max_nan(top, __shfl_xor_sync(~0u, top, d));
        // 2^e is the largest power of two among them, and the unit 2^(e - BITS)
        u32 e = max(__float_as_uint(top) & 0x7F800000, 0x20000000);
        float up = __uint_as_float((127 + BITS) * 0x00800000u - (e - 127 * 0x00800000u));
        float unit = top < __uint_as_float(0x7F800000) ? __uint_as_float(e - BITS * 0x00800000u) : __uint_as_float(0x7FC00000);
        u32 total = 0;
        if constexpr (KIND == 1) {
            #pragma unroll
            for (int p = 0; p < PIECES; p++) {
                const float* b = a + 8 * p;
                *(uint4*)(xs + m * x_pitch + (i * PIECES + p) * 16) =
                    make_uint4(two_fp16(b[0] * up, b[1] * up), two_fp16(b[2] * up, b[3] * up),
                               two_fp16(b[4] * up, b[5] * up), two_fp16(b[6] * up, b[7] * up));
            }
        } else {
            // Adding 1.5 * 2^23 leaves an integer in the mantissa. With 0x8080 more, both of its bytes are 128 too large:
            // the low one is then 0 to 255, and flipping their highest bits makes both signed.
            #pragma unroll
            for (int p = 0; p < PIECES; p++) {
                u32 q[8], digit[2][2];
                #pragma unroll
                for (int j = 0; j < 8; j++) {
                    q[j] = __float_as_uint(fmaf(a[8 * p + j], up, 12582912.0f + 0x8080));
                    total += q[j];
                }
                #pragma unroll
                for (int word = 0; word < 2; word++) {
                    const int at = KIND == 3 ? word : 4 * word, by = KIND == 3 ? 2 : 1;  // int4: even columns, then odd ones
                    const u32 b = __byte_perm(q[at], q[at + by], 0x5410), c = __byte_perm(q[at + 2 * by], q[at + 3 * by], 0x5410);
                    digit[0][word] = __byte_perm(b, c, 0x6420) ^ 0x80808080, digit[1][word] = __byte_perm(b, c, 0x7531) ^ 0x80808080;
                }
                for (int d = 0; d < 2; d++)
                    *(uint2*)(xs + (2 * m + d) * x_pitch + (i * PIECES + p) * 8) = make_uint2(digit[d][0], digit[d][1]);
            }
        }
        total -= 8 * PIECES * (0x4B400000u + 0x8080);
        if (KIND == 3)
            for (int d = 1; d < LANES; d *= 2) total += __shfl_xor_sync(~0u, total, d);
        if (i % LANES == 0) {
            const int at = i / LANES * ROOM + m;
            if (KIND == 3) ((float2*)units)[at] = make_float2(unit, (int)total * unit);
            else units[at] = unit;
        }
    }
}

// Eight bf16, times a power of two, as fp16, in the order in which nibbles come out of a word, 0 and 4, 1 and 5, ...; odd ones
// are divided by 16, as their weights will be 16 times too large. Exact, but for what is 2^-28 of the largest.
__device__ __forceinline__ uint4 as_fp16(const u32 (&x)[4], float up) {
    const float odd = up * 0.0625f;
    return make_uint4(two_fp16(low_bf16(x[0]) * up, low_bf16(x[2]) * up), two_fp16(high_bf16(x[0]) * odd, high_bf16(x[2]) * odd),
                      two_fp16(low_bf16(x[1]) * up, low_bf16(x[3]) * up), two_fp16(high_bf16(x[1]) * odd, high_bf16(x[3]) * odd));
}

// int4 as fp16: a warp prepares the columns of a chunk that it multiplies, in the order in which it does, without waiting for
// any other warp. Lane (g, t) has eight columns of each batch, from `column` on, of row g of x -> what undoes that they are
// relative to the row's largest. Adds the row's squares to `square` in lanes whose t is g / 2; leaves sums for each batch.
__device__ __forceinline__ float prepare(X (&kept)[BATCHES], float4* sums, float& square, const u16* x, const u16* norm,
                                         int column, int end_column, float offset) {
    const int g = threadIdx.x % 32 / 4;
    u32 n[BATCHES][4], v[BATCHES][4];  // zeros beyond the end, which there are no weights for
    #pragma unroll
    for (int b = 0; b < BATCHES; b++) {
        *(uint4*)n[b] = make_uint4(0, 0, 0, 0);
        if (norm && column + 32 * b < end_column) *(uint4*)n[b] = *(const uint4*)(norm + column + 32 * b);
    }
    // From here on the kernel before this one is complete; the next one may start, and send for its weights.
    asm volatile("griddepcontrol.wait; griddepcontrol.launch_dependents;" ::: "memory");
    #pragma unroll
    for (int b = 0; b < BATCHES; b++) {
        *(uint4*)v[b] = make_uint4(0, 0, 0, 0);
        if (column + 32 * b < end_column) *(uint4*)v[b] = load_fresh((const uint4*)(x + column + 32 * b));
    }
    if (norm) {  // on the diagonal of products of all rows with all
        float products[2][4] = {};
        #pragma unroll
        for (int b = 0; b < BATCHES; b++) {
            mma(products[0], v[b][0], 0, v[b][1], 0, v[b][0], v[b][1]);
            mma(products[1], v[b][2], 0, v[b][3], 0, v[b][2], v[b][3]);
        }
        square += g % 2 ? products[0][1] + products[1][1] : products[0][0] + products[1][0];
    }
    if (norm && offset == 0)
        #pragma unroll
        for (int i = 0; i < 4 * BATCHES; i++) v[i / 4][i % 4] = multiply_bf16(v[i / 4][i % 4], n[i / 4][i % 4]);
    else if (norm)
        #pragma unroll
        for (int i = 0; i < 4 * BATCHES; i++) {
            u32 &raw = v[i / 4][i % 4], weight = n[i / 4][i % 4];
            raw = two_bf16(low_bf16(raw) * (low_bf16(weight) + offset), high_bf16(raw) * (high_bf16(weight) + offset));
        }
    u32 top = 0;
    #pragma unroll
    for (int i = 0; i < 4 * BATCHES; i++) top = max_bf16(top, v[i / 4][i % 4]);
    top = max(top & 0x7FFF, top >> 16 & 0x7FFF);
    for (int d = 1; d < 4; d *= 2) top = max(top, __shfl_xor_sync(~0u, top, d));
    const u32 e = max(top >> 7, 15);  // the exponent, as bits; the largest will be 2^14 or more
    const float up = __uint_as_float((268 - e) << 23);
    #pragma unroll
    for (int b = 0; b < BATCHES; b++) {
        kept[b].four[0] = as_fp16(v[b], up);
        // What a group's products have too much is its zero times the sum of x, and 1024 times that of even columns and of odd
        // ones' sixteenths: products with weights of -1, in odd columns -16, and with weights of -1024.
        constexpr u32 EVEN = 0xBC00BC00, ODD = 0xCC00CC00, BASE = 0xE400E400;
        float sum[4] = {};
        mma_fp16(sum, EVEN, BASE, ODD, BASE, kept[b].of[0], kept[b].of[1]);
        mma_fp16(sum, EVEN, BASE, ODD, BASE, kept[b].of[2], kept[b].of[3]);
        if (g == 0) sums[4 * b] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    }
    return top < 0x7F80 ? __uint_as_float((e - 14) << 23) : __uint_as_float(0x7FC00000);  // nan, if it is not finite
}

extern "C" __global__ void __launch_bounds__(THREADS + 32 + 32 * FINISHERS, 1)
linear(const __grid_constant__ Maps maps, const float* __restrict__ scale, const u16* __restrict__ x,
       const u16* __restrict__ bias, const u16* __restrict__ norm, const u16* __restrict__ residual, u16* __restrict__ y,
       int M, int N, int K, float eps, float offset, int activation, int stages, int panels, u32* taken,
       const __grid_constant__ Words words
#if EXPERTS
       , const __grid_constant__ Experts experts
#endif
) {
    extern __shared__ __align__(1024) u8 shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    constexpr int PER_128 = KIND == 0 ? 64 : KIND == 3 ? 256 : 128, UNIT = KIND == 3 ? 8 * GROUP : PER_128;  // columns
    const int part = SPLIT > 1 ? blockIdx.x % SPLIT : 0, own = (K / UNIT + SPLIT - 1) / SPLIT * UNIT, begin = part * own;
    const int chunks = (own / PER_128 * 128 + CHUNK - 1) / CHUNK, a_panel = (chunks + panels - 1) / panels;
    const int columns = a_panel * (CHUNK / 128 * PER_128), spans = columns / SPAN;
    const int x_bytes = HALVES ? 2 * columns : columns, x_pitch = x_bytes + ((X_BANK - x_bytes) & 127);
    const bool pairs = activation != 0;                                                  // rows of gate, and of up
    const int step = pairs ? ROWS / 2 : ROWS;
    u8* xs = shared + stages * STAGE;
    float* units = (float*)(xs + (!NIBBLES ? (HALVES ? M : 2 * M) * x_pitch : ONE ? 0 : ROOM * x_bytes));  // or sums of x
    float* parts = units + (KIND > 0 ? ROOM * spans * (KIND == 3 ? 2 : 1) : 0);          // [2][WARPS][ROWS][ROOM]
    float* squares = parts + 2 * WARPS * ROWS * ROOM;                                    // [ROOM][WARPS * 32 / ROOM]
    float* downs = squares + WARPS * 32;                                                 // [chunks of a panel][WARPS][ROOM]
    float* from_other = downs + (NIBBLES && !ONE ? a_panel * WARPS * ROOM : 0);          // see finish
    float* totals = from_other + FINISHERS * 32 * OTHERS * (PLACES * EACH + 1);          // [tiles][ROWS][ROOM]
    const int tiles = panels > 1 ? N / (step * (gridDim.x / SPLIT)) + 1 : 0;             // of this block, at most
    Tile* tile_of = (Tile*)(totals + tiles * ROWS * ROOM);                               // by stage
    const u32 full = address(tile_of + stages), empty = full + stages * 8;
    const u32 summed = empty + stages * 8, received = summed + 32;  // two tiles in turn, then that they are read; by place

    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; i++) set_up(full + i * 8, 1), set_up(empty + i * 8, WARPS + FINISHERS);
        for (int i = 0; i < 2; i++) set_up(summed + i * 8, WARPS), set_up(summed + 16 + i * 8, FINISHERS);
        for (int i = 0; i < FINISHERS * PLACES; i++) set_up(received + i * 8, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (SPLIT > 1) asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    Ring ring{full, empty, stages, 0, 0};

#if EXPERTS
    u32* matrix = (u32*)((u8*)(tile_of + stages) + stages * 16 + 32 + FINISHERS * PLACES * 8);  // behind the barriers
    const Rows rows{matrix, experts.outputs, experts.shared};
#else
    const Rows rows{nullptr, N, 1};
#endif
    if (warp == WARPS) {
#if EXPERTS
        if (!experts.early) asm volatile("griddepcontrol.wait;" ::: "memory");
        for (int i = lane; i < N / experts.outputs; i += 32) matrix[i] = load_fresh((const u32*)(experts.of + i));
        __syncwarp();  // others read it after a tile's barrier
#endif
        if (lane == 0)
            send(ring, maps.w[part], maps.scale_zero[part], shared, tile_of, N, step, pairs, chunks, a_panel, panels, taken,
                 rows);
        return;
    }
    if (warp > WARPS) {
        finish(ring, tile_of, parts, totals, summed, norm ? squares : nullptr, scale, bias, residual, y, M, N, K, eps, step,
               activation, chunks, a_panel, panels, from_other, received, part, words, rows);
        return;
    }

    // Of a row of x, what a thread takes at a time is an item. Where there are several rows, half of the threads take half
    // of them.
    const int end_column = min(own, K - begin);
    constexpr int THEIRS = ROOM / GROUPS, BESIDE = THREADS / GROUPS;
    constexpr int KEEP = ROOM == 8 ? 2 : 4;                          // items that a thread has under way, of each row
    const int items = end_column / 8 / PIECES, places = columns / 8 / PIECES;  // of a row; of a panel
    const int first_row = threadIdx.x / BESIDE * THEIRS, first_item = threadIdx.x % BESIDE;
    float sums[THEIRS] = {};  // of squares
    const auto load_norm = [&](uint4 (&n)[PIECES], int i) {
        #pragma unroll
        for (int p = 0; p < PIECES; p++) {
            n[p] = make_uint4(0, 0, 0, 0);
            if (norm && i < items) n[p] = ((const uint4*)(norm + begin))[i * PIECES + p];
        }
    };

    // Sums of columns that there is no row of x for are not stored. Where there is one for most columns, the others repeat the
    // last, which is cheaper than zeros.
    const int in_columns = HALVES ? M : 2 * M;
    const bool mine = (HALVES ? ROOM : 2 * ROOM) >= 8 || g % PLANES < in_columns;
    const u8* x_of[2] = {xs + min(g % PLANES, in_columns - 1) * x_pitch, xs + min(g + 8, in_columns - 1) * x_pitch};
    // int4, of batch b of the columns that begin at a byte of W's rows: whose scale a thread needs (in 32 columns), what of x
    // it multiplies, and x's unit and sum.
    const auto slot_of = [&](int b) { return ROOM == 1 ? 2 * t + b : b * SLOTS + t / (PLANES / 2); };
    const auto x_at = [&](int at, int b) {
        X v = {};
        if constexpr (ROOM == 1) {
            if (g / 2 == t)
                for (int j = 0; j < 2; j++)
                    v.four[j] = *(const uint4*)(xs + g % 2 * x_pitch + 2 * (at + 16 * slot_of(b)) + 16 * j);
        } else if constexpr (NIBBLES)
            v.four[0] = *(const uint4*)(xs + 32 * (at + 16 * b) + lane * 16);
        else if (mine)
            v.two = *(const uint2*)(x_of[0] + 2 * (at + 16 * (b * SLOTS + g / PLANES) + 4 * t));
        return v;
    };
    const auto unit_at = [&](int at, int b) {
        return ((const float2*)units)[(at / 16 + slot_of(b)) * ROOM + t % (PLANES / 2)];
    };
    // int4: where a lane's things are in a stage: the word of a batch's scale and zero, or four of them; and the 16 bytes of a
    // row that it names to ldmatrix, which gives it words t of rows g and g + 8, of two pieces of 16 bytes.
    const auto scale_at = [&](int i, int j) {
        const int group = ((i * WARPS + warp) * SHARE / 16 + slot_of(j)) * 32 / GROUP;
        return 2 * HALF + group / WORDS * BOX + g * (WORDS * 4) + (group % WORDS / 4 ^ g * WORDS / 32) * 16 + group % 4 * 4;
    };
    int fours_at[BLOCKS], piece_at[BLOCKS];
    #pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
        const int byte = (i * WARPS + warp) * SHARE, piece = byte % 128 / 16 + lane / 16;
        fours_at[i] = scale_at(i, 0);
        piece_at[i] = byte / 128 * 1024 + lane / 8 % 2 * HALF + lane % 8 * 128 + (piece ^ lane % 8) * 16;
        if (KIND == 3 && ROOM > 1) asm volatile("" : "+r"(fours_at[i]), "+r"(piece_at[i]));  // not computed anew for each tile
    }
    // Where a thread leaves its sums of even tiles, and tells of them. Not of one row of x, for which the compiler then puts the
    // same instructions into another order, that is 2% slower.
    int sums_at = (u8*)(parts + (warp * ROWS + g) * ROOM + (HALVES ? 2 * t : t)) - shared, told_at = summed;
    if (ROOM > 1) asm volatile("" : "+r"(sums_at), "+r"(told_at));  // as above
    u32 turn = 0;
    for (int panel = 0; panel < panels; panel++) {
        if (panel && !NIBBLES) consumers_meet();  // done with the panel before
        const int count = ONE ? 1 : min(a_panel, chunks - panel * a_panel);
        X kept[BLOCKS][BATCHES];  // of x, where a warp multiplies the same columns of every tile
        float2 kept_unit[BLOCKS][BATCHES];
        float2 down = make_float2(1, 1);  // int4 as fp16: what undoes that a thread's two rows of x are relative to their largest
        if constexpr (NIBBLES) {
            static_assert(!NIBBLES || BLOCKS == 1, "a warp multiplies one piece of a chunk");
            for (int k = 0; k < count; k++) {
                const int at = k * CHUNK + warp * SHARE, column = (panel * a_panel * CHUNK + at) * 2 + 8 * t;
                const float undo = prepare(kept[0], (float4*)units + at / 4 + t, sums[0], x + min(g, M - 1) * K + begin,
                                           norm ? norm + begin : nullptr, column, end_column, offset);
                if (ONE) down = make_float2(__shfl_sync(~0u, undo, 8 * t), __shfl_sync(~0u, undo, 8 * t + 4));
                else {
                    #pragma unroll
                    for (int b = 0; b < BATCHES; b++) *(uint4*)(xs + 32 * (at + 16 * b) + lane * 16) = kept[0][b].four[0];
                    if (t == 0) downs[(k * WARPS + warp) * ROOM + g] = undo;
                }
            }
            __syncwarp();
            if (norm && panel == panels - 1) squares[(g * WARPS + warp) * 4 + t] = t == g / 2 ? sums[0] : 0;
        } else {
            for (int at = 0; at < places; at += KEEP * BESIDE) {
                uint4 n[2][PIECES], v[KEEP][THEIRS][PIECES];  // zeros beyond the end, which there are no weights for
                const int item = panel * places + at + first_item;
                #pragma unroll
                for (int j = 0; j < 2; j++) load_norm(n[j], item + j * BESIDE);
                // From here on the kernel before this one is complete; the next one may start, and send for its weights.
                asm volatile("griddepcontrol.wait; griddepcontrol.launch_dependents;" ::: "memory");
                #pragma unroll
                for (int j = 0; j < KEEP; j++)
                    #pragma unroll
                    for (int m = 0; m < THEIRS; m++)
                        #pragma unroll
                        for (int p = 0; p < PIECES; p++) {
                            const int i = item + j * BESIDE;
                            v[j][m][p] = make_uint4(0, 0, 0, 0);
                            if (first_row + m < M && i < items)
                                v[j][m][p] = load_fresh((const uint4*)(x + (first_row + m) * K + begin) + i * PIECES + p);
                        }
                #pragma unroll
                for (int j = 0; j < KEEP; j++) {
                    const int i = at + first_item + j * BESIDE;
                    if (i >= places) break;
                    #pragma unroll
                    for (int m = 0; m < THEIRS; m++) {
                        if (first_row + m < M) put(xs, units, x_pitch, first_row + m, i, v[j][m], n[j % 2], norm, offset);
                        #pragma unroll
                        for (int k = 0; k < 4 * PIECES; k++) {
                            const u32 raw = ((const u32*)v[j][m])[k];
                            sums[m] += low_bf16(raw) * low_bf16(raw) + high_bf16(raw) * high_bf16(raw);
                        }
                    }
                    if (j + 2 < KEEP) load_norm(n[j % 2], item + (j + 2) * BESIDE);
                }
            }
            consumers_meet();
            if (norm && panel == panels - 1) {  // nobody waits for it but who finishes the first tile
                #pragma unroll
                for (int half = THEIRS / 2, d = 16; half; half /= 2, d /= 2)  // a lane has half as many rows to add up
                    #pragma unroll
                    for (int m = 0; m < half; m++) {
                        const float other = __shfl_xor_sync(~0u, lane & d ? sums[m] : sums[m + half], d);
                        sums[m] = (lane & d ? sums[m + half] : sums[m]) + other;
                    }
                constexpr int LANES = 32 / THEIRS;  // that have a row's sums
                squares[(first_row + lane / LANES) * (WARPS / GROUPS * LANES) +
                        warp % (WARPS / GROUPS) * LANES + lane % LANES] = sums[0];
            }
            if constexpr (ONE)
                #pragma unroll
                for (int i = 0; i < BLOCKS; i++)
                    #pragma unroll
                    for (int b = 0; b < BATCHES; b++) {
                        const int at = (i * WARPS + warp) * SHARE;
                        kept[i][b] = x_at(at, b), kept_unit[i][b] = unit_at(at, b);
                    }
        }

        for (;; turn++) {
            float c[CHAINS][4] = {}, sum[TILES][2] = {};
            wait_for(ring.full + ring.stage * 8, ring.parity);
            const Tile tile = tile_of[ring.stage];
            const bool end = tile.rows == 0;
            for (int k = 0, chunk = ONE ? 0 : tile.chunk; k < (end ? 0 : count); k++) {
                if (k) wait_for(ring.full + ring.stage * 8, ring.parity);
                // Weights into registers, so that the stage can be filled again soon.
                uint4 w[BLOCKS][SHARE / 32];
                u32 s[BLOCKS][BATCHES][2];
                const int at_stage = ring.stage * STAGE;
                #pragma unroll
                for (int i = 0; i < BLOCKS; i++) {
                    if constexpr (KIND == 3)
                        #pragma unroll
                        for (int j = 0; j < BATCHES; j += FOURS ? 4 : 1)
                            #pragma unroll
                            for (int h = 0; h < 2; h++) {
                                const int offset = FOURS ? fours_at[i] ^ j / 4 * 16 : scale_at(i, j);
                                const u8* ss = shared + at_stage + offset + h * BOXES * BOX;
                                if (!FOURS) s[i][j][h] = *(const u32*)ss;
                                else {
                                    const uint4 four = *(const uint4*)ss;
                                    s[i][j][h] = four.x, s[i][j + 1][h] = four.y, s[i][j + 2][h] = four.z, s[i][j + 3][h] = four.w;
                                }
                            }
                    if constexpr (KIND == 3 && ROOM > 1)
                        #pragma unroll
                        for (int j = 0; j < SHARE / 32; j++)
                            w[i][j] = load_matrices(address(shared) + (at_stage + piece_at[i] ^ 32 * j));
                    else {
                        const int byte = (i * WARPS + warp) * SHARE, unit = byte % 128 / 16;
                        const u8* ws = shared + at_stage + byte / 128 * 1024 + g * 128;
                        #pragma unroll
                        for (int u = 0; u < SHARE / 64; u++) {
                            w[i][2 * u] = *(const uint4*)(ws + ((unit + SHARE / 64 * t + u) ^ g) * 16);
                            w[i][2 * u + 1] = *(const uint4*)(ws + HALF + ((unit + SHARE / 64 * t + u) ^ g) * 16);
                        }
                    }
                }
                if (ROOM == 1) ring.release(lane);  // with more rows the compiler had better mix what follows with the above
                #pragma unroll
                for (int i = 0; i < BLOCKS; i++) {
                    const int at = chunk * CHUNK + (i * WARPS + warp) * SHARE;  // byte of the panel's row of W
                    if constexpr (KIND == 3 && ROOM == 1)
                        #pragma unroll
                        for (int u = 0; u < 2; u++) {
                            const uint4 lo = w[i][2 * u], hi = w[i][2 * u + 1];
                            const u32 lows[4] = {lo.x, lo.y, lo.z, lo.w}, highs[4] = {hi.x, hi.y, hi.z, hi.w};
                            const X v = ONE ? kept[i][u] : x_at(at, u);
                            int dot[4] = {};
                            #pragma unroll
                            for (int j = 0; j < 4; j++)
                                mma_nibbles(dot, lows[j], highs[j], v.of[2 * j], v.of[2 * j + 1]);
                            add_group(sum[0], dot, ONE ? kept_unit[i][u] : unit_at(at, u), s[i][u][0], s[i][u][1]);
                        }
                    else if constexpr (NIBBLES) {
                        const u32* words = (const u32*)w[i];
                        #pragma unroll
                        for (int b = 0; b < BATCHES; b++) {
                            const X v = ONE ? kept[i][b] : x_at(at, b);
                            const u32 lo = words[2 * b], hi = words[2 * b + 1], s_lo = s[i][b][0], s_hi = s[i][b][1];
                            constexpr u32 LOW = 0x000F000F, HIGH = 0x00F000F0;
                            const float4 total = ((const float4*)units)[(at / 16 + b) * 4 + t];  // no registers are left for these
                            const float zeros[2] = {fp16(s_lo >> 16), fp16(s_hi >> 16)};
                            float dot[4];
                            #pragma unroll
                            for (int j = 0; j < 4; j++)
                                dot[j] = j % 2 ? fmaf(zeros[j / 2], total.y, total.w) : fmaf(zeros[j / 2], total.x, total.z);
                            mma_fp16(dot, two_nibbles(lo, LOW), two_nibbles(hi, LOW), two_nibbles(lo, HIGH), two_nibbles(hi, HIGH),
                                     v.of[0], v.of[1]);
                            mma_fp16(dot, two_nibbles(lo >> 8, LOW), two_nibbles(hi >> 8, LOW), two_nibbles(lo >> 8, HIGH),
                                     two_nibbles(hi >> 8, HIGH), v.of[2], v.of[3]);
                            #pragma unroll
                            for (int j = 0; j < 4; j++) c[0][j] = fmaf(fp16(j / 2 ? s_hi : s_lo), dot[j], c[0][j]);
                        }
                    } else if constexpr (KIND == 3) {
                        const u32* words = (const u32*)w[i];
                        #pragma unroll
                        for (int b = 0; b < BATCHES; b++) {
                            const X v = ONE ? kept[i][b] : x_at(at, b);
                            int dot[4] = {};
                            #pragma unroll
                            for (int j = 0; j < SLOTS; j++) {
                                const u32 lo = words[2 * (b * SLOTS + j)], hi = words[2 * (b * SLOTS + j) + 1];
                                const bool here = g / PLANES == j;
                                mma_nibbles(dot, lo, hi, here ? v.of[0] : 0, here ? v.of[1] : 0);
                            }
                            add_group(sum[0], dot, ONE ? kept_unit[i][b] : unit_at(at, b), s[i][b][0], s[i][b][1]);
                        }
                    } else {
                        int whole[TILES][4] = {};
                        float partial[CHAINS][4] = {};
                        #pragma unroll
                        for (int u = 0; u < SHARE / 64; u++) {
                            const uint4 lo = w[i][2 * u], hi = w[i][2 * u + 1];
                            const int byte = at + SHARE / 4 * t + 16 * u;
                            if constexpr (KIND == 0) {
                                uint4 v = make_uint4(0, 0, 0, 0);
                                if (mine) v = *(const uint4*)(x_of[0] + byte);
                                mma(c[0], lo.x, hi.x, lo.y, hi.y, v.x, v.y);
                                mma(c[1], lo.z, hi.z, lo.w, hi.w, v.z, v.w);
                            } else if constexpr (KIND == 1) {
                                uint4 v[2] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
                                if (mine) {
                                    v[0] = *(const uint4*)(x_of[0] + 2 * byte);
                                    v[1] = *(const uint4*)(x_of[0] + 2 * byte + 16);
                                }
                                const u32 lows[4] = {lo.x, lo.y, lo.z, lo.w}, highs[4] = {hi.x, hi.y, hi.z, hi.w};
                                const u32 b[8] = {v[0].x, v[0].y, v[0].z, v[0].w, v[1].x, v[1].y, v[1].z, v[1].w};
                                #pragma unroll
                                for (int j = 0; j < 4; j++) {
                                    u32 l[2], h[2];
                                    unpack_fp8(lows[j], l[0], l[1]), unpack_fp8(highs[j], h[0], h[1]);
                                    mma_fp16(partial[j % CHAINS], l[0], h[0], l[1], h[1], b[2 * j], b[2 * j + 1]);
                                }
                            } else {
                                #pragma unroll
                                for (int o = 0; o < TILES; o++) {
                                    uint4 v = make_uint4(0, 0, 0, 0);
                                    if (mine) v = *(const uint4*)(x_of[o] + byte);
                                    mma(whole[o], lo.x, hi.x, lo.y, hi.y, v.x, v.y);
                                    mma(whole[o], lo.z, hi.z, lo.w, hi.w, v.z, v.w);
                                }
                            }
                        }
                        if constexpr (KIND == 1) {
                            #pragma unroll
                            for (int j = 0; j < 4; j++) {
                                const float unit = units[at / 128 * ROOM + min(2 * t + j % 2, ROOM - 1)];
                                for (int n = 0; n < CHAINS; n++) c[n][j] += partial[n][j] * unit;
                            }
                        } else if constexpr (KIND == 2) {
                            #pragma unroll
                            for (int o = 0; o < TILES; o++) {
                                const float unit = units[at / 128 * ROOM + min(t + 4 * o, ROOM - 1)];
                                sum[o][0] += (float)(whole[o][0] + (whole[o][1] << 8)) * unit;
                                sum[o][1] += (float)(whole[o][2] + (whole[o][3] << 8)) * unit;
                            }
                        }
                    }
                }
                if (ROOM > 1) ring.release(lane);
                if constexpr (NIBBLES) {
                    if (!ONE) down = *(const float2*)(downs + (chunk * WARPS + warp) * ROOM + 2 * t);
                    #pragma unroll
                    for (int j = 0; j < 4; j++) c[1][j] = fmaf(j % 2 ? down.y : down.x, c[0][j], c[1][j]), c[0][j] = 0;
                }
                chunk = chunk + 1 < count ? chunk + 1 : 0;
            }
            if (end) {
                ring.release(lane);
                break;
            }
            // Warps took different columns: their sums meet in shared memory, in two places in turn.
            const u32 told = ROOM > 1 ? told_at : summed;
            wait_for(told + 16 + turn % 2 * 8, turn / 2 % 2 ^ 1);
            float* sums_here = ROOM > 1 ? (float*)(shared + sums_at) + turn % 2 * (WARPS * ROWS * ROOM)
                                        : parts + (turn % 2 * WARPS + warp) * ROWS;
            const int first = ROOM > 1 ? 0 : g + t;  // else it is counted in
            if constexpr (HALVES) {
                float all[4];
                for (int j = 0; j < 4; j++) all[j] = NIBBLES ? c[1][j] : c[0][j] + c[1][j];
                if constexpr (ROOM == 1) {
                    if (t == 0) sums_here[first] = all[0], sums_here[first + 8] = all[2];
                } else if (2 * t < ROOM) {
                    *(float2*)sums_here = make_float2(all[0], all[1]);
                    *(float2*)(sums_here + 8 * ROOM) = make_float2(all[2], all[3]);
                }
            } else {
                for (int d = PLANES / 2; d < 4; d *= 2)
                    for (int j = 0; j < 2; j++) sum[0][j] += __shfl_xor_sync(~0u, sum[0][j], d);
                for (int j = 0; j < TILES; j++)
                    if (t + 4 * j < ROOM) sums_here[first + 4 * j] = sum[j][0], sums_here[first + 8 * ROOM + 4 * j] = sum[j][1];
            }
            arrive(told + turn % 2 * 8, lane);
        }
    }
}
