/* LAMB on the CPU, one bucket of tensors at a time: what a thread does of it.
 *
 * Every thread that takes part calls lamb_run with the same struct and takes chunks until none is left. The first visit
 * of a chunk moves m and v and leaves the sums of the chunk. The second one computes u again and moves w. Sums are added
 * up in one order, so that the number of threads changes no bit. A thread never waits for one that has not come.
 *
 * Compiled without -ffast-math: NaN and infinity must stay what they are.
 */
#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

enum { CHUNK = 16384, BLOCK = 256, LANES = 16 };
enum { W, G, M, V, STEP, NUMEL, FIRST, COLUMNS };             /* of a tensor: FIRST is the first of its chunks */
enum { WEIGHT_SQ, UPDATE_SQ, NONZERO, DOT, SUMS };            /* rows of the sums, as hf_lamb.norms.Sum */
enum { FLOAT32, BFLOAT16, FLOAT16 };                          /* dtypes of weights and gradients; m and v are float32 */
enum { SQUARE_GRADIENTS, FIRST_VISIT, SECOND_VISIT, UPDATE }; /* tasks; UPDATE is both visits, part by part */

typedef struct {
    atomic_llong next_first, done_first, ready, next_second; /* chunks taken and done in the visits */
} Progress;
_Static_assert(sizeof(Progress) == 4 * sizeof(int64_t), "Python gives it as four int64 for each part");

typedef struct {
    int64_t tensors, parts;
    const int64_t *table;        /* [tensors, COLUMNS] */
    const int64_t *first_tensor; /* [parts + 1], of each part */
    Progress *progress;          /* [parts], zeros */
    float *of_chunks;            /* [chunks, SUMS] */
    float *sums;                 /* [SUMS, tensors] */
    float *inverses;             /* [2, tensors], made by lamb_begin: 1 / (1 - beta**t) */
    float *step_sizes, *growths; /* [tensors]: read by SECOND_VISIT, made by UPDATE */
    const uint8_t *finite;       /* 0 skips the step; NULL: it is not skipped */
    const float *clip_factor;    /* NULL: 1 */
    const double *lr;
    double beta1, beta2, eps, weight_decay, min_ratio, max_ratio;
    int32_t task, w_type, g_type, maximize, bias_correction, adapts, fixes_norms;
} Bucket;

/* -- tensors as float32, a block at a time -- */

static float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* A block in float32: where it lies, or a copy in `room`. */
static const float *load(const void *tensor, int type, int64_t start, int n, float *room) {
    if (type == FLOAT32) return (const float *)tensor + start;
    if (type == BFLOAT16) {
        const uint16_t *x = (const uint16_t *)tensor + start;
        for (int i = 0; i < n; i++) room[i] = from_bits((uint32_t)x[i] << 16);
    } else {
        const _Float16 *x = (const _Float16 *)tensor + start;
        for (int i = 0; i < n; i++) room[i] = (float)x[i];
    }
    return room;
}

static void store(void *tensor, int type, int64_t start, int n, const float *x) {
    if (type == BFLOAT16) {
        uint16_t *to = (uint16_t *)tensor + start;
        for (int i = 0; i < n; i++) { /* to nearest, ties to even; NaN stays NaN */
            uint32_t bits = to_bits(x[i]);
            uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
            to[i] = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
        }
    } else if (type == FLOAT16) {
        _Float16 *to = (_Float16 *)tensor + start;
        for (int i = 0; i < n; i++) to[i] = (_Float16)x[i];
    }
}

/* By halves, and blocks in double: a float32 sum of a whole chunk is off by up to 1e-5 if all elements are alike. */
static double add_lanes(float *lanes) {
    for (int half = LANES / 2; half; half /= 2)
        for (int j = 0; j < half; j++) lanes[j] += lanes[j + half];
    return lanes[0];
}

/* -- the arithmetic of a block: float32 -- */

typedef struct {
    float beta1, rest1, beta2, rest2, eps, weight_decay, factor, inverse1, inverse2;
} Numbers;

static inline float direction(const Numbers *c, float w, float m, float v) {
    return m * c->inverse1 / (sqrtf(v * c->inverse2) + c->eps) + c->weight_decay * w;
}

typedef struct {
    double w_sq, u_sq, dot;
    uint32_t nonzero; /* bits of g and m, without the signs */
} Sums;

/* Move m and v, unless the step is skipped, and add to the sums. The second loop prefetches the next block. */
static inline void first_of_block(const Numbers *c, int n, const float *restrict w, const float *restrict g,
                                  float *restrict m, float *restrict v, int skip, int dots, Sums *sums) {
    float w_sq[LANES] = {0}, u_sq[LANES] = {0}, dot[LANES] = {0};
    uint32_t nonzero[LANES] = {0};
    if (!skip)
        for (int i = 0; i < n; i++) {
            float scaled = c->factor * g[i];
            m[i] = c->beta1 * m[i] + c->rest1 * scaled;
            v[i] = c->beta2 * v[i] + c->rest2 * scaled * scaled;
        }
    int whole = n - n % LANES;
    for (int i = 0; i < whole; i += LANES) {
        __builtin_prefetch(g + i + BLOCK);
        __builtin_prefetch(m + i + BLOCK);
        __builtin_prefetch(v + i + BLOCK);
        for (int j = 0; j < LANES; j++) {
            float u = direction(c, w[i + j], m[i + j], v[i + j]);
            w_sq[j] += w[i + j] * w[i + j];
            u_sq[j] += u * u;
            if (dots) dot[j] += w[i + j] * u;
            nonzero[j] |= to_bits(g[i + j]) << 1 | to_bits(m[i + j]) << 1;
        }
    }
    for (int i = whole; i < n; i++) {
        float u = direction(c, w[i], m[i], v[i]);
        w_sq[i - whole] += w[i] * w[i];
        u_sq[i - whole] += u * u;
        if (dots) dot[i - whole] += w[i] * u;
        nonzero[i - whole] |= to_bits(g[i]) << 1 | to_bits(m[i]) << 1;
    }
    sums->w_sq += add_lanes(w_sq);
    sums->u_sq += add_lanes(u_sq);
    if (dots) sums->dot += add_lanes(dot);
    for (int j = 0; j < LANES; j++) sums->nonzero |= nonzero[j];
}

/* -- chunks -- */

static const void *pointer(const int64_t *row, int column) { return (const void *)(intptr_t)row[column]; }

static int skipped(const Bucket *b) { return b->finite && !*b->finite; }

static Numbers numbers(const Bucket *b, int64_t tensor) {
    Numbers c = {b->beta1, 1 - b->beta1, b->beta2, 1 - b->beta2, b->eps, b->weight_decay, 1,
                 b->inverses[tensor], b->inverses[b->tensors + tensor]};
    if (b->clip_factor) c.factor = *b->clip_factor;
    if (b->maximize) c.factor = -c.factor;
    return c;
}

static void square_gradients(const Bucket *b, int64_t tensor, int64_t start, int64_t stop, float *sums) {
    const int64_t *row = b->table + tensor * COLUMNS;
    float room[BLOCK];
    double sum = 0;
    for (int64_t at = start; at < stop; at += BLOCK) {
        int n = stop - at < BLOCK ? stop - at : BLOCK, whole = n - n % LANES;
        float lanes[LANES] = {0};
        const float *g = load(pointer(row, G), b->g_type, at, n, room);
        for (int i = 0; i < whole; i += LANES)
            for (int j = 0; j < LANES; j++) lanes[j] += g[i + j] * g[i + j];
        for (int i = whole; i < n; i++) lanes[i - whole] += g[i] * g[i];
        sum += add_lanes(lanes);
    }
    sums[0] = sum;
}

static void first_visit(const Bucket *b, int64_t tensor, int64_t start, int64_t stop, float *sums) {
    const int64_t *row = b->table + tensor * COLUMNS;
    float w_room[BLOCK], g_room[BLOCK];
    Sums of_chunk = {0, 0, 0, 0};
    Numbers c = numbers(b, tensor);
    int skip = skipped(b);
    for (int64_t at = start; at < stop; at += BLOCK) {
        int n = stop - at < BLOCK ? stop - at : BLOCK;
        const float *w = load(pointer(row, W), b->w_type, at, n, w_room);
        const float *g = load(pointer(row, G), b->g_type, at, n, g_room);
        float *m = (float *)pointer(row, M) + at, *v = (float *)pointer(row, V) + at;
        if (b->fixes_norms) first_of_block(&c, n, w, g, m, v, skip, 1, &of_chunk); /* two loops are compiled */
        else first_of_block(&c, n, w, g, m, v, skip, 0, &of_chunk);
    }
    sums[WEIGHT_SQ] = of_chunk.w_sq;
    sums[UPDATE_SQ] = of_chunk.u_sq;
    sums[NONZERO] = of_chunk.nonzero != 0;
    sums[DOT] = of_chunk.dot;
}

static void second_visit(const Bucket *b, int64_t tensor, int64_t start, int64_t stop) {
    float room[BLOCK], step_size = b->step_sizes[tensor], growth = b->growths[tensor];
    if (step_size == 0) return; /* eps may be 0, and u no number */
    const int64_t *row = b->table + tensor * COLUMNS;
    Numbers c = numbers(b, tensor);
    for (int64_t at = start; at < stop; at += BLOCK) {
        int n = stop - at < BLOCK ? stop - at : BLOCK;
        const float *restrict m = (const float *)pointer(row, M) + at, *restrict v = (const float *)pointer(row, V) + at;
        float *restrict w = (float *)load(pointer(row, W), b->w_type, at, n, room);
        for (int i = 0; i < n; i++) w[i] = w[i] - step_size * direction(&c, w[i], m[i], v[i]) + growth * w[i];
        store((void *)pointer(row, W), b->w_type, at, n, w);
    }
}

/* -- tensors -- */

/* As hf_lamb.norms.norm_keeping: step_size is lr * r, and becomes that of a step which keeps the norm. */
static double norm_keeping(const float *sums, double *step_size) {
    if (!(sums[WEIGHT_SQ] > 0) || *step_size == 0) return 0;
    double x = *step_size * (*step_size * sums[UPDATE_SQ] - 2.0 * sums[DOT]) / sums[WEIGHT_SQ], q = sqrt(1 + x);
    double growth = x <= 1e-4 - 1 ? 0 : -x / (q * (1 + q));
    *step_size = x <= 1e-4 - 1 ? 0 : *step_size * (1 + growth);
    return growth;
}

/* The sums of a tensor from those of its chunks, and with UPDATE its step size and growth. */
static void finish(const Bucket *b, int64_t tensor, int64_t chunks) {
    const float *of_chunks = b->of_chunks + b->table[tensor * COLUMNS + FIRST] * SUMS;
    int kinds = b->task == SQUARE_GRADIENTS ? 1 : SUMS;
    float sums[SUMS];
    for (int kind = 0; kind < kinds; kind++) {
        double sum = 0;
        for (int64_t chunk = 0; chunk < chunks; chunk++) sum += of_chunks[chunk * SUMS + kind];
        sums[kind] = b->sums[kind * b->tensors + tensor] = sum;
    }
    if (b->task != UPDATE) return;
    double ratio = 1;
    if (b->adapts) {
        float w_norm = sqrtf(sums[WEIGHT_SQ]), u_norm = sqrtf(sums[UPDATE_SQ]);
        if (w_norm > 0 && u_norm > 0) ratio = w_norm / u_norm;
        if (ratio < b->min_ratio) ratio = b->min_ratio;
        if (ratio > b->max_ratio) ratio = b->max_ratio;
        if (!(sums[NONZERO] > 0)) ratio = 0;
    }
    double step_size = skipped(b) ? 0 : *b->lr * ratio;
    b->growths[tensor] = b->fixes_norms ? norm_keeping(sums, &step_size) : 0;
    b->step_sizes[tensor] = step_size;
}

static int64_t chunks_of(const int64_t *row) { return (row[NUMEL] + CHUNK - 1) / CHUNK; }

/* The tensor of a part that a chunk belongs to: the last that begins no later and has chunks. */
static int64_t owner(const Bucket *b, int64_t low, int64_t high, int64_t chunk) {
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (b->table[middle * COLUMNS + FIRST] <= chunk) low = middle;
        else high = middle;
    }
    return low;
}

typedef struct {
    int64_t tensor, start, stop; /* elements of a tensor */
} Chunk;

static Chunk chunk_of(const Bucket *b, int64_t part, int64_t chunk) {
    int64_t tensor = owner(b, b->first_tensor[part], b->first_tensor[part + 1], chunk);
    const int64_t *row = b->table + tensor * COLUMNS;
    int64_t start = (chunk - row[FIRST]) * CHUNK;
    return (Chunk){tensor, start, row[NUMEL] - start < CHUNK ? row[NUMEL] : start + CHUNK};
}

static int64_t chunks_in(const Bucket *b, int64_t part) {
    const int64_t *last = b->table + (b->first_tensor[part + 1] - 1) * COLUMNS;
    return last[FIRST] + chunks_of(last) - b->table[b->first_tensor[part] * COLUMNS + FIRST];
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* A thread takes some chunks at once, at most a 64th of the part: of small tensors many are a moment's work. */
static void run_part(const Bucket *b, int64_t part) {
    int64_t from = b->first_tensor[part], to = b->first_tensor[part + 1], i;
    int64_t first = b->table[from * COLUMNS + FIRST], chunks = chunks_in(b, part), some = chunks / 64 + 1;
    Progress *p = b->progress + part;

    while (b->task != SECOND_VISIT && (i = atomic_fetch_add(&p->next_first, some)) < chunks) {
        int64_t end = least(i + some, chunks);
        for (int64_t k = i; k < end; k++) {
            Chunk c = chunk_of(b, part, first + k);
            float *sums = b->of_chunks + (first + k) * SUMS;
            if (b->task == SQUARE_GRADIENTS) square_gradients(b, c.tensor, c.start, c.stop, sums);
            else first_visit(b, c.tensor, c.start, c.stop, sums);
        }
        if (atomic_fetch_add(&p->done_first, end - i) + end - i == chunks) { /* the last of all threads */
            for (int64_t tensor = from; tensor < to; tensor++)
                finish(b, tensor, chunks_of(b->table + tensor * COLUMNS));
            atomic_store(&p->ready, 1);
        }
    }
    if (b->task < SECOND_VISIT || !chunks) return;
    while (b->task == UPDATE && !atomic_load(&p->ready)) sched_yield();
    while ((i = atomic_fetch_add(&p->next_second, some)) < chunks)
        for (int64_t k = i; k < least(i + some, chunks); k++) {
            Chunk c = chunk_of(b, part, first + chunks - 1 - k); /* the last one is still in the cache */
            second_visit(b, c.tensor, c.start, c.stop);
        }
}

/* t += 1, except where the step is skipped, and the bias corrections; by one thread, before a first visit. */
void lamb_begin(const Bucket *b) {
    double known = 0, inverse1 = 1, inverse2 = 1; /* of the tensor before, which mostly has the same t */
    for (int64_t tensor = 0; tensor < b->tensors; tensor++) {
        float *step = (float *)pointer(b->table + tensor * COLUMNS, STEP);
        if (!skipped(b)) *step += 1;
        double t = *step > 1 ? *step : 1; /* a tensor whose first step is skipped still has t = 0 */
        if (b->bias_correction && t != known) {
            inverse1 = 1 / (1 - pow(b->beta1, t));
            inverse2 = 1 / (1 - pow(b->beta2, t));
            known = t;
        }
        b->inverses[tensor] = inverse1;
        b->inverses[b->tensors + tensor] = inverse2;
    }
}

/* What one thread does of the task; it is done when all threads have returned. */
void lamb_run(const Bucket *b) {
    for (int64_t part = 0; part < b->parts; part++) run_part(b, part);
}
