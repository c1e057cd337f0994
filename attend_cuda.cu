// Attention of a few new tokens over a static KV cache, on Hopper and newer; see kernels_cuda.py, which compiles and
// launches it.
//
// What matters at short contexts is the chain from the first load to the last store, since nothing else can run
// meanwhile: old keys and values are in registers before the kernel before this one has ended (programmatic dependent
// launch), and a context of 256 slots is one block's, so that no blocks have to meet. Longer ones are split over blocks.
//
// A block takes up to 8 query rows: the G query heads of a new token, and those of the tokens after it; more rows are
// other blocks'. A warp takes 16 slots at a time. Both products are tensor cores' with the slots or the values' columns
// as the tall side, and the query rows as the narrow one: scores^T = K q^T, and result^T = V^T p^T. Keys and values go from
// global memory to registers as they lie; products do not care about the order of what they sum over, and where the
// order of a result's rows is not the memory's, the store makes it so.
//
// Set at compilation: D (of a head: 64 or 128). Sources: PTX ISA (mma.m16n8k16, movmatrix, griddepcontrol), Flash-Decoding
// (https://pytorch.org/blog/flash-decoding/), online softmax (1805.02867).

typedef unsigned int u32;
typedef unsigned char u8;
typedef unsigned short u16;
typedef long long i64;

constexpr int WARPS = 16, THREADS = WARPS * 32;
constexpr int PITCH = 2 * D + 16;       // bytes from a row in shared memory to the next, over all banks
constexpr int ITEMS = D / 32;           // of 16 bytes of a key, that a thread holds
constexpr int PLANES = D / 64;          // of 16 bytes of a value
constexpr int ACC_PITCH = D + 2;
#define MINUS_INFINITY __int_as_float(0xFF800000)

__device__ __forceinline__ float low_bf16(u32 v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ u16 to_bf16(float v) { u16 r; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v)); return r; }
__device__ __forceinline__ u32 two_bf16(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
// From L2: L1 may remember an earlier kernel's buffer.
__device__ __forceinline__ u16 load_fresh(const u16* p) { u16 v; asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(p)); return v; }
__device__ __forceinline__ u32 load_fresh(const u32* p) { u32 v; asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p)); return v; }
__device__ __forceinline__ float load_fresh(const float* p) { float v; asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p)); return v; }

__device__ __forceinline__ void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ u32 transposed(u32 v) {  // of an 8 x 8 matrix of bf16
    u32 r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}

struct Slots {  // sixteen of them: where keys and values are, bytes from one to the next, and the last that exists
    const u8 *k, *v;
    int pitch, last;
};

struct Keys { uint4 of[2][ITEMS]; };      // of slots g and 8 + g: columns 8 (4 i + t) ...
struct Values { uint4 of[4][PLANES]; };   // of slots 2t, 2t + 1, 2t + 8, 2t + 9: columns 64 i + 8 g ...

__device__ __forceinline__ void load(Keys& keys, const Slots& at) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    #pragma unroll
    for (int j = 0; j < 2; j++)
        #pragma unroll
        for (int i = 0; i < ITEMS; i++)
            keys.of[j][i] = *(const uint4*)(at.k + (i64)min(8 * j + g, at.last) * at.pitch + 16 * (4 * i + t));
}

__device__ __forceinline__ void load(Values& values, const Slots& at) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    #pragma unroll
    for (int j = 0; j < 4; j++)
        #pragma unroll
        for (int i = 0; i < PLANES; i++)
            values.of[j][i] = *(const uint4*)(at.v + (i64)min(8 * (j / 2) + 2 * t + j % 2, at.last) * at.pitch + 128 * i + 16 * g);
}

__device__ __forceinline__ u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

struct Rows {  // online softmax over slots, of query rows 2t and 2t + 1
    float top[2], total[2], acc[4 * PLANES][4];
};

// Takes 16 more slots into account, where seen(which row, slot).
template <typename Seen>
__device__ __forceinline__ void attend(Rows& rows, const u8* q, const Keys& keys, const Values& values, float scale,
                                       float softcap, Seen seen) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float s[4] = {};  // slot g: rows 2t, 2t + 1; slot 8 + g
    #pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const uint4 v = *(const uint4*)(q + g * PITCH + 16 * (4 * i + t)), &lo = keys.of[0][i], &hi = keys.of[1][i];
        mma(s, lo.x, hi.x, lo.y, hi.y, v.x, v.y);
        mma(s, lo.z, hi.z, lo.w, hi.w, v.z, v.w);
    }
    float p[4];
    #pragma unroll
    for (int h = 0; h < 2; h++) {
        float top = rows.top[h];
        #pragma unroll
        for (int j = 0; j < 2; j++) {
            float v = s[2 * j + h] * scale;
            if (softcap > 0) v = softcap * (1 - 2 / (__expf(2 * v / softcap) + 1));
            s[2 * j + h] = seen(h, 8 * j + g) ? v : MINUS_INFINITY;
            top = fmaxf(top, s[2 * j + h]);
        }
        for (int d = 4; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
        const float base = top == MINUS_INFINITY ? 0 : top, fade = __expf(rows.top[h] - base);
        p[h] = __expf(s[h] - base), p[2 + h] = __expf(s[2 + h] - base);
        rows.top[h] = top, rows.total[h] = rows.total[h] * fade + p[h] + p[2 + h];
        #pragma unroll
        for (int i = 0; i < 4 * PLANES; i++) rows.acc[i][h] *= fade, rows.acc[i][2 + h] *= fade;
    }
    const u32 b0 = transposed(two_bf16(p[0], p[1])), b1 = transposed(two_bf16(p[2], p[3]));
    #pragma unroll
    for (int i = 0; i < PLANES; i++)
        #pragma unroll
        for (int j = 0; j < 4; j++) {  // columns 64 i + 8 g + 2 j and one more
            const u32 v[4] = {word(values.of[0][i], j), word(values.of[1][i], j), word(values.of[2][i], j), word(values.of[3][i], j)};
            mma(rows.acc[4 * i + j], __byte_perm(v[0], v[1], 0x5410), __byte_perm(v[0], v[1], 0x7632),
                __byte_perm(v[2], v[3], 0x5410), __byte_perm(v[2], v[3], 0x7632), b0, b1);
        }
}

// Block (row b, kv head and eight query rows; split): its share of the context.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
attend(const u16* __restrict__ qkv, const float* __restrict__ cos, const float* __restrict__ sin,
       const i64* __restrict__ pos, const u16* __restrict__ q_norm, const u16* __restrict__ k_norm, u16* k_cache,
       u16* v_cache, float* part, u32* count, u16* __restrict__ y, int T, int KV, int G, int S, float scale,
       float softcap, int window, float eps, float offset) {
    __shared__ __align__(16) u8 q[8 * PITCH], k_new[8 * PITCH], v_new[8 * PITCH];
    __shared__ __align__(16) float tops[WARPS][8], totals[WARPS][8];
    __shared__ int position[8];  // of the new tokens
    __shared__ u32 arrived;
    extern __shared__ __align__(16) float dynamic[];  // more than a block has without asking
    float (*accs)[8][ACC_PITCH] = (float (*)[8][ACC_PITCH])dynamic;  // [WARPS]: results, rows apart by their parity
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int parts = (G * T + 7) / 8, r0 = blockIdx.x % parts * 8, R = min(8, G * T - r0);  // rows r0 ... r0 + R - 1
    const int b = blockIdx.x / parts / KV, head = blockIdx.x / parts % KV, split = blockIdx.y, width = KV * (G + 2) * D;

    const i64 cell = ((i64)b * KV + head) * S * D;
    const u8 *k_old = (const u8*)(k_cache + cell), *v_old = (const u8*)(v_cache + cell);
    Keys keys;
    Values values;
    int p, start, end, n, old;  // position of the first new token: the slots before it are attended to; this block's of them
    const auto slots_at = [&](int tile) {
        const int slot = start + 16 * tile;
        return Slots{k_old + (i64)slot * 2 * D, v_old + (i64)slot * 2 * D, 2 * D, end - 1 - slot};
    };
    const auto begin = [&](int first_new) {
        p = first_new;
        const int first = window ? max(p + 1 - window, 0) : 0;
        const int share = max((p - first + gridDim.y - 1) / gridDim.y + 31 & ~31, 16 * WARPS);
        n = max((p - first + share - 1) / share, 1);  // splits that have anything to do
        start = first + split * share, end = min(start + share, p), old = (end - start + 15) / 16;
        if (split < n && warp < old) load(keys, slots_at(warp)), load(values, slots_at(warp));
    };
    const auto position_of = [&](int token) { return (int)load_fresh((const u32*)(pos + b * T + token)); };
    // The position of one token is as old as the step. Those of several may have just been computed: what lies there until
    // then is most often right, since all layers have the same, and else this begins again.
    begin(min(max(position_of(0), 0), S - 1));
    if (T == 1 && split >= n) return;  // at once: what comes after this kernel may have the multiprocessor
    // From here on the kernel before this one is complete; the next one may start, and send for its weights.
    asm volatile("griddepcontrol.wait; griddepcontrol.launch_dependents;" ::: "memory");
    if (T > 1) {
        const int now = position_of(0);
        if (now != p) begin(now);
    }
    if (split >= n) return;
    const bool last = split == n - 1;  // takes the new tokens too
    const int tiles = old + last;
    if (threadIdx.x < T) position[threadIdx.x] = T > 1 ? position_of(threadIdx.x) : p;

    // Queries, and the new keys: normalized, rotated, into shared memory too.
    for (int r = warp; r < R + (last ? T : 0); r += WARPS) {
        const bool query = r < R;
        const int token = b * T + (query ? (r0 + r) / G : r - R);
        const u16* from = qkv + (i64)token * width + (query ? head * G + (r0 + r) % G : KV * G + head) * D;
        const u16* weight = query ? q_norm : k_norm;
        float lo[PLANES], hi[PLANES], c[PLANES], s[PLANES], squares = 0;
        #pragma unroll
        for (int i = 0; i < PLANES; i++) {
            lo[i] = low_bf16(load_fresh(from + lane + 32 * i)), hi[i] = low_bf16(load_fresh(from + D / 2 + lane + 32 * i));
            c[i] = cos[(i64)token * (D / 2) + lane + 32 * i], s[i] = sin[(i64)token * (D / 2) + lane + 32 * i];
            squares += lo[i] * lo[i] + hi[i] * hi[i];
        }
        if (weight) {  // rounded as the plain one is
            for (int d = 16; d; d /= 2) squares += __shfl_xor_sync(~0u, squares, d);
            const float inv = rsqrtf(squares / D + eps);
            #pragma unroll
            for (int i = 0; i < PLANES; i++) {
                lo[i] = low_bf16(to_bf16(lo[i] * inv * (low_bf16(weight[lane + 32 * i]) + offset)));
                hi[i] = low_bf16(to_bf16(hi[i] * inv * (low_bf16(weight[D / 2 + lane + 32 * i]) + offset)));
            }
        }
        u16* to = (u16*)(query ? q + r * PITCH : k_new + (r - R) * PITCH);
        u16* cached = query || r0 ? to : k_cache + cell + (i64)(T > 1 ? position_of(r - R) : p) * D;
        #pragma unroll
        for (int i = 0; i < PLANES; i++) {
            const u16 a = to_bf16(lo[i] * c[i] - hi[i] * s[i]), d = to_bf16(hi[i] * c[i] + lo[i] * s[i]);
            to[lane + 32 * i] = cached[lane + 32 * i] = a, to[D / 2 + lane + 32 * i] = cached[D / 2 + lane + 32 * i] = d;
        }
    }
    // New values too, by the last warps: the first ones have other things to wait for.
    if (last)
        #pragma unroll 1
        for (int i = THREADS - 1 - threadIdx.x; i < T * (D / 2); i += THREADS) {
            const int token = b * T + i / (D / 2), d = i % (D / 2);
            const u32 v = load_fresh((const u32*)(qkv + (i64)token * width + (KV * (G + 1) + head) * D) + d);
            ((u32*)(v_new + i / (D / 2) * PITCH))[d] = v;
            if (r0 == 0) ((u32*)(v_cache + cell + (i64)(T > 1 ? position_of(i / (D / 2)) : p) * D))[d] = v;
        }
    __syncthreads();

    int row_pos[2];  // of query rows 2t and 2t + 1; rows beyond R are computed from what lies there, and not stored
    #pragma unroll
    for (int h = 0; h < 2; h++) row_pos[h] = position[(r0 + min(2 * t + h, R - 1)) / G];
    Rows rows;
    rows.top[0] = rows.top[1] = MINUS_INFINITY, rows.total[0] = rows.total[1] = 0;
    #pragma unroll
    for (int i = 0; i < 4 * PLANES; i++) rows.acc[i][0] = rows.acc[i][1] = rows.acc[i][2] = rows.acc[i][3] = 0;
    #pragma unroll 1
    for (int i = warp; i < tiles; i += WARPS) {
        const Slots fresh{k_new, v_new, PITCH, T - 1};
        const int exist = i < old ? end - start - 16 * i : T;
        if (i == old) load(keys, fresh), load(values, fresh);
        attend(rows, q, keys, values, scale, softcap, [&](int h, int j) {
            if (j >= exist) return false;
            if (i < old) return !window || start + 16 * i + j > row_pos[h] - window;
            const int here = position[j];  // a token that only repeats the one before it is not seen twice
            return here <= row_pos[h] && (j == 0 || here != position[j - 1]) && (!window || here > row_pos[h] - window);
        });
        if (i + WARPS < old) load(keys, slots_at(i + WARPS)), load(values, slots_at(i + WARPS));
    }
    // Warps took different slots: they meet.
    #pragma unroll
    for (int h = 0; h < 2; h++) {
        float total = rows.total[h];
        for (int d = 4; d < 32; d *= 2) total += __shfl_xor_sync(~0u, total, d);
        if (g == 0) tops[warp][2 * t + h] = rows.top[h], totals[warp][2 * t + h] = total;
        #pragma unroll
        for (int i = 0; i < PLANES; i++)
            #pragma unroll
            for (int j = 0; j < 4; j++)  // rows 0, 2, 4, 6, 1, 3, 5, 7, which spreads these stores over all banks
                *(float2*)&accs[warp][4 * h + t][64 * i + 8 * g + 2 * j] =
                    make_float2(rows.acc[4 * i + j][h], rows.acc[4 * i + j][2 + h]);
    }
    __syncthreads();
    const auto place = [&](int r, int d) {  // in y
        return y + (i64)(b * T + (r0 + r) / G) * (KV * G * D) + (head * G + (r0 + r) % G) * D + d;
    };
    float* mine = part + ((i64)blockIdx.x * gridDim.y * 8 + split * R) * (D + 2);  // a row: its result, top and total
    for (int i = threadIdx.x; i < R * (D / 2); i += THREADS) {
        const int r = i / (D / 2), d = i % (D / 2) * 2;
        float top = MINUS_INFINITY, total = 0;
        float2 acc = make_float2(0, 0);
        #pragma unroll
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, tops[w][r]);
        const float base = top == MINUS_INFINITY ? 0 : top;
        #pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float gain = __expf(tops[w][r] - base);
            const float2 theirs = *(const float2*)&accs[w][4 * (r % 2) + r / 2][d];
            total += gain * totals[w][r], acc.x += gain * theirs.x, acc.y += gain * theirs.y;
        }
        if (n == 1)
            *(u32*)place(r, d) = two_bf16(acc.x / total, acc.y / total);
        else {
            *(float2*)(mine + r * (D + 2) + d) = acc;
            if (d == 0) *(float2*)(mine + r * (D + 2) + D) = make_float2(top, total);
        }
    }
    if (n == 1) return;
    // The last block to arrive combines what all have left.
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        arrived = atomicAdd(count + blockIdx.x, 1);
        if (arrived == n - 1) count[blockIdx.x] = 0;
        __threadfence();
    }
    __syncthreads();
    if (arrived != n - 1) return;
    const float* all = part + (i64)blockIdx.x * gridDim.y * 8 * (D + 2);
    constexpr int AHEAD = 8;  // splits whose numbers are under way at a time
    for (int i = threadIdx.x; i < R * D; i += THREADS) {
        const int r = i / D, d = i % D;
        float top = MINUS_INFINITY, total = 0, acc = 0;
        for (int j0 = 0; j0 < n; j0 += AHEAD) {
            float its_top[AHEAD], its_total[AHEAD], its_acc[AHEAD], higher = top;
            #pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                const float* its = all + (min(j0 + j, n - 1) * R + r) * (D + 2);
                its_top[j] = load_fresh(its + D), its_total[j] = load_fresh(its + D + 1), its_acc[j] = load_fresh(its + d);
            }
            #pragma unroll
            for (int j = 0; j < AHEAD; j++) higher = fmaxf(higher, its_top[j]);
            const float base = higher == MINUS_INFINITY ? 0 : higher, fade = __expf(top - base);
            top = higher, total *= fade, acc *= fade;
            #pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                const float gain = j0 + j < n ? __expf(its_top[j] - base) : 0;
                total += gain * its_total[j], acc += gain * its_acc[j];
            }
        }
        *place(r, d) = to_bf16(acc / total);
    }
}
