/* Operators of onnxruntime: a rational of each group of channels, and a look-up in a table of each group.

       cc -std=gnu11 -O3 -ffp-contract=fast -fPIC -shared operators.c -o operators.so

   Domain "flashkat", attribute groups. Rows have the last dimension's length; a group is a run of neighbours. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* What is used of onnxruntime's C interface, which only ever grows: what an operator is since its version 13, and
   places in its table of functions. An error that a function returns is not looked at: none can fail here. */
typedef struct Operator Operator;
struct Operator {
    uint32_t version;
    void *(*create)(const Operator *, const void *api, const void *info);
    const char *(*name)(const Operator *);
    const char *(*provider)(const Operator *);
    int (*input_type)(const Operator *, size_t);
    size_t (*input_count)(const Operator *);
    int (*output_type)(const Operator *, size_t);
    size_t (*output_count)(const Operator *);
    void (*compute)(void *, void *context);
    void (*destroy)(void *);
    int (*input_kind)(const Operator *, size_t);
    int (*output_kind)(const Operator *, size_t);
    int (*input_memory)(const Operator *, size_t);
};
enum { API_VERSION = 17, OPERATOR_VERSION = 13, FLOAT = 1, UINT8 = 2, INT64 = 7, MOST_DIMENSIONS = 16 };
typedef const void *const *Api;
typedef void *Status;
#define FUNCTION(api, place, ...) ((Status (*)(__VA_ARGS__))(api)[place])
#define create_domain(api) FUNCTION(api, 26, const char *, void **)
#define add_operator(api) FUNCTION(api, 27, void *, const Operator *)
#define add_domain(api) FUNCTION(api, 28, void *, void *)
#define tensor_data(api) FUNCTION(api, 51, void *, void **)
#define tensor_rank(api) FUNCTION(api, 61, const void *, size_t *)
#define tensor_shape(api) FUNCTION(api, 62, const void *, int64_t *, size_t)
#define tensor_elements(api) FUNCTION(api, 64, const void *, size_t *)
#define tensor_info(api) FUNCTION(api, 65, const void *, void **)
#define integer_attribute(api) FUNCTION(api, 86, const void *, const char *, int64_t *)
#define kernel_input(api) FUNCTION(api, 90, const void *, size_t, const void **)
#define kernel_output(api) FUNCTION(api, 91, void *, size_t, const int64_t *, size_t, void **)
#define release_info(api) FUNCTION(api, 99, void *)
#define parallel_for(api) FUNCTION(api, 274, const void *, void (*)(void *, size_t), size_t, size_t, void *)

typedef struct { Api api; int64_t groups; } Kernel;

typedef struct {
    void *data;
    size_t elements, rank;
    int64_t shape[MOST_DIMENSIONS];
} Tensor;

typedef struct {  /* a look at one call, for the threads that share it */
    const void *x, *tables;
    void *y;
    const float *coefficients[10];
    int64_t step[10];  /* from a group's coefficient to the next group's; 0: one for all */
    int64_t rows, groups, width, chunk;
} Task;

/* gcc makes a form of a function for each level of the processor, and the library takes the best when it is loaded */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && !defined(ONE_PROCESSOR)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define FOR_EACH_PROCESSOR
#endif
#define LANES 8  /* a row's neighbours that are computed together */
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int Bits __attribute__((vector_size(4 * LANES)));

/* y = P(x) / Q(|x|) in rows from first on */
FOR_EACH_PROCESSOR
static void rational_rows(const Task *task, int64_t first, int64_t last) {
    for (int64_t segment = first * task->groups; segment < last * task->groups; segment++) {
        const float *x = (const float *)task->x + segment * task->width;
        float *y = (float *)task->y + segment * task->width, c[10];
        for (int k = 0; k < 10; k++) c[k] = task->coefficients[k][segment % task->groups * task->step[k]];
        for (int64_t i = 0; i < task->width; i += LANES) {
            const size_t size = 4 * (task->width - i < LANES ? task->width - i : LANES);
            Vector v = {0};
            if (size == sizeof v) memcpy(&v, x + i, sizeof v); else memcpy(&v, x + i, size);
            const Vector u = (Vector)((Bits)v & 0x7fffffff);
            const Vector p = c[0] + v * (c[1] + v * (c[2] + v * (c[3] + v * (c[4] + v * c[5]))));
            const Vector q = 1 + u * (c[6] + u * (c[7] + u * (c[8] + u * c[9])));
            const Vector f = p / q;
            if (size == sizeof f) memcpy(y + i, &f, sizeof f); else memcpy(y + i, &f, size);
        }
    }
}

/* y = table of the group[x] in rows from first on */
static void lookup_rows(const Task *task, int64_t first, int64_t last) {
    for (int64_t segment = first * task->groups; segment < last * task->groups; segment++) {
        const uint8_t *x = (const uint8_t *)task->x + segment * task->width;
        const uint8_t *table = (const uint8_t *)task->tables + segment % task->groups * 256;
        uint8_t *y = (uint8_t *)task->y + segment * task->width;
        for (int64_t i = 0; i < task->width; i++) y[i] = table[x[i]];
    }
}

static int64_t end(const Task *task, int64_t first) {
    return first + task->chunk < task->rows ? first + task->chunk : task->rows;
}
static void rational_chunk(void *task, size_t index) {
    const int64_t first = index * ((Task *)task)->chunk;
    rational_rows(task, first, end(task, first));
}
static void lookup_chunk(void *task, size_t index) {
    const int64_t first = index * ((Task *)task)->chunk;
    lookup_rows(task, first, end(task, first));
}

static Tensor input(Api api, void *context, size_t index) {
    Tensor tensor = {0};
    const void *value = NULL;
    void *info = NULL;
    kernel_input(api)(context, index, &value);
    tensor_info(api)(value, &info);
    tensor_elements(api)(info, &tensor.elements);
    tensor_rank(api)(info, &tensor.rank);
    tensor_shape(api)(info, tensor.shape, tensor.rank < MOST_DIMENSIONS ? tensor.rank : MOST_DIMENSIONS);
    release_info(api)(info);
    tensor_data(api)((void *)value, &tensor.data);
    return tensor;
}

/* run the rows of input 0 in chunks, by onnxruntime's threads */
static void compute(const Kernel *kernel, void *context, Task task, void (*chunk)(void *, size_t)) {
    const Tensor x = input(kernel->api, context, 0);
    void *value = NULL;
    kernel_output(kernel->api)(context, 0, x.shape, x.rank, &value);
    tensor_data(kernel->api)(value, &task.y);
    if (!x.elements) return;
    const int64_t channels = x.shape[x.rank - 1];
    task.x = x.data;
    task.groups = kernel->groups;
    task.width = channels / kernel->groups;
    task.rows = x.elements / channels;
    task.chunk = 1 + 16384 / channels;
    parallel_for(kernel->api)(context, chunk, (task.rows + task.chunk - 1) / task.chunk, 0, &task);
}
static void compute_rational(void *kernel, void *context) {
    const Kernel *own = kernel;
    Task task = {0};
    for (int k = 0; k < 10; k++) {
        const Tensor column = input(own->api, context, k + 1);
        task.coefficients[k] = column.data;
        task.step[k] = column.elements > 1 ? column.elements / own->groups : 0;
    }
    compute(own, context, task, rational_chunk);
}
static void compute_lookup(void *kernel, void *context) {
    const Kernel *own = kernel;
    Task task = {.tables = input(own->api, context, 1).data};
    compute(own, context, task, lookup_chunk);
}

static void *create(const Operator *operator, const void *api, const void *info) {
    Kernel *kernel = malloc(sizeof *kernel);
    kernel->api = api;
    kernel->groups = 1;
    integer_attribute(kernel->api)(info, "groups", &kernel->groups);
    return kernel;
}
static const char *rational_name(const Operator *operator) { return "GroupRational"; }
static const char *lookup_name(const Operator *operator) { return "GroupLookup"; }
static const char *provider(const Operator *operator) { return "CPUExecutionProvider"; }
static int float_type(const Operator *operator, size_t index) { return FLOAT; }
static int byte_type(const Operator *operator, size_t index) { return UINT8; }
static int lookup_type(const Operator *operator, size_t index) { return index < 2 ? UINT8 : INT64; }
static size_t one(const Operator *operator) { return 1; }
static size_t six(const Operator *operator) { return 6; }
static size_t eleven(const Operator *operator) { return 11; }
static int zero(const Operator *operator, size_t index) { return 0; }  /* required; in the default memory */
static const Operator operators[] = {
    {OPERATOR_VERSION, create, rational_name, provider, float_type, eleven, float_type, one, compute_rational, free,
     zero, zero, zero},
    {OPERATOR_VERSION, create, lookup_name, provider, lookup_type, six, byte_type, one, compute_lookup, free, zero,
     zero, zero},
};

typedef struct { const void *(*api)(uint32_t version); } Base;

Status RegisterCustomOps(void *options, const Base *base) {
    const Api api = base->api(API_VERSION);
    void *domain = NULL;
    Status status = create_domain(api)("flashkat", &domain);
    for (int i = 0; i < 2 && !status; i++) status = add_operator(api)(domain, &operators[i]);
    return status ? status : add_domain(api)(options, domain);
}
