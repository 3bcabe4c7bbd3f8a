/* A libcublasLt that computes nothing: it checks what it is given as NVIDIA's documentation has it,
   and writes each product down in JSON for the tests to read. Any function can be made to fail. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15, ALGO = 4711 };

typedef struct {
  int type;
  uint64_t rows, cols;
  int64_t ld;
} Layout;

typedef struct {
  int compute_type, scale_type;
  int32_t transa, transb;
  uint32_t epilogue;
  void *bias, *aux;
  int64_t aux_ld;
} Desc;

typedef struct {
  uint64_t workspace;
  uint32_t schemes, alignments[4];
} Preference;

typedef struct {
  uint64_t algo[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
} Result;

static char failing[64], record[2048];
static int failure, objects, handles, found = 1, state = SUCCESS;
static size_t needed = 1000;
static Preference last;

/* What the tests set and ask. */
void fake_fail(const char *function, int status) {
  strncpy(failing, function, sizeof failing - 1);
  failure = status;
}
void fake_answer(int new_found, int new_state, size_t new_needed) {
  found = new_found, state = new_state, needed = new_needed;
}
const char *fake_record(void) { return record; }
int fake_objects(void) { return objects; } /* that are alive */
int fake_handles(void) { return handles; } /* that were made */
void fake_reset(void) {
  failing[0] = record[0] = 0;
  handles = 0, found = 1, state = SUCCESS, needed = 1000;
}

#define MAY_FAIL                                                                                   \
  if (strcmp(failing, __func__) == 0)                                                              \
    return failure;

#define COPY(field)                                                                                \
  do {                                                                                             \
    if (bytes != sizeof field)                                                                     \
      return INVALID_VALUE;                                                                        \
    memcpy(&field, value, bytes);                                                                  \
    return SUCCESS;                                                                                \
  } while (0)

static void *make(size_t bytes) {
  ++objects;
  return calloc(1, bytes);
}

static int destroy(void *object) {
  --objects;
  free(object);
  return SUCCESS;
}

size_t cublasLtGetVersion(void) { return 130100; }

const char *cublasLtGetStatusString(int status) {
  return status == NOT_SUPPORTED ? "not supported" : "another error";
}

int cublasLtCreate(void **handle) {
  MAY_FAIL
  ++handles;
  *handle = &handles;
  return SUCCESS;
}

int cublasLtMatmulDescCreate(void **desc, int compute_type, int scale_type) {
  MAY_FAIL
  Desc *made = *desc = make(sizeof(Desc));
  made->compute_type = compute_type, made->scale_type = scale_type, made->epilogue = 1;
  return SUCCESS;
}

int cublasLtMatmulDescDestroy(void *desc) { return destroy(desc); }

int cublasLtMatmulDescSetAttribute(void *desc, int attribute, const void *value, size_t bytes) {
  MAY_FAIL
  Desc *d = desc;
  switch (attribute) {
  case 3: /* CUBLASLT_MATMUL_DESC_TRANSA */
    COPY(d->transa);
  case 4: /* _TRANSB */
    COPY(d->transb);
  case 7: /* _EPILOGUE */
    COPY(d->epilogue);
  case 8: /* _BIAS_POINTER */
    COPY(d->bias);
  case 11: /* _EPILOGUE_AUX_POINTER */
    COPY(d->aux);
  case 12: /* _EPILOGUE_AUX_LD */
    COPY(d->aux_ld);
  }
  return INVALID_VALUE;
}

int cublasLtMatrixLayoutCreate(void **layout, int type, uint64_t rows, uint64_t cols, int64_t ld) {
  MAY_FAIL
  Layout *made = *layout = make(sizeof(Layout));
  made->type = type, made->rows = rows, made->cols = cols, made->ld = ld;
  return SUCCESS;
}

int cublasLtMatrixLayoutDestroy(void *layout) { return destroy(layout); }

int cublasLtMatmulPreferenceCreate(void **preference) {
  MAY_FAIL
  *preference = make(sizeof(Preference));
  return SUCCESS;
}

int cublasLtMatmulPreferenceDestroy(void *preference) { return destroy(preference); }

int cublasLtMatmulPreferenceSetAttribute(void *preference, int attribute, const void *value,
                                         size_t bytes) {
  MAY_FAIL
  Preference *p = preference;
  switch (attribute) {
  case 1: /* CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES */
    COPY(p->workspace);
  case 3: /* _REDUCTION_SCHEME_MASK */
    COPY(p->schemes);
  case 5: /* _MIN_ALIGNMENT_A_BYTES, then those of B, C and D */
  case 6:
  case 7:
  case 8:
    COPY(p->alignments[attribute - 5]);
  }
  return INVALID_VALUE;
}

/* Whether the layouts are those of D (m, n) = op(A) (m, k) op(B) (k, n), counted by columns. */
static int fit(const Desc *d, const Layout *a, const Layout *b, const Layout *c,
               const Layout *out) {
  const uint64_t m = out->rows, n = out->cols, k = d->transa ? a->rows : a->cols;
  const Layout *all[] = {a, b, c, out};
  for (int i = 0; i < 4; ++i)
    if (all[i]->ld < (int64_t)all[i]->rows || all[i]->type != out->type)
      return 0;
  if (d->aux != NULL && (d->aux_ld % 8 != 0 || d->aux_ld < (int64_t)m))
    return 0;
  return (d->transa ? a->cols : a->rows) == m && (d->transb ? b->cols : b->rows) == k &&
         (d->transb ? b->rows : b->cols) == n && c->rows == m && c->cols == n;
}

int cublasLtMatmulAlgoGetHeuristic(void *handle, void *desc, void *a, void *b, void *c, void *d,
                                   void *preference, int wanted, Result *results, int *count) {
  MAY_FAIL
  if (handle != &handles || wanted < 1 || !fit(desc, a, b, c, d))
    return INVALID_VALUE;
  last = *(Preference *)preference;
  results[0].algo[0] = ALGO, results[0].workspace = needed, results[0].state = state;
  *count = found;
  return SUCCESS;
}

int cublasLtMatmul(void *handle, void *desc, const float *alpha, const void *a, Layout *a_layout,
                   const void *b, Layout *b_layout, const float *beta, const void *c,
                   Layout *c_layout, void *d, Layout *d_layout, const uint64_t *algo,
                   void *workspace, size_t bytes, void *stream) {
  MAY_FAIL
  const Desc *e = desc;
  if (handle != &handles || !fit(desc, a_layout, b_layout, c_layout, d_layout) || algo[0] != ALGO ||
      bytes < needed || (bytes > 0 && workspace == NULL))
    return INVALID_VALUE;
  int at = sprintf(record,
                   "{\"compute_type\": %d, \"scale_type\": %d, \"transa\": %d, \"transb\": %d, "
                   "\"epilogue\": %u, \"bias\": %llu, \"aux\": %llu, \"aux_ld\": %lld, "
                   "\"alpha\": %g, \"beta\": %g, \"bytes\": %zu, \"workspace\": %llu, "
                   "\"stream\": %llu, \"limit\": %llu, \"schemes\": %u, "
                   "\"alignments\": [%u, %u, %u, %u]",
                   e->compute_type, e->scale_type, e->transa, e->transb, e->epilogue,
                   (unsigned long long)e->bias, (unsigned long long)e->aux, (long long)e->aux_ld,
                   *alpha, *beta, bytes, (unsigned long long)workspace, (unsigned long long)stream,
                   (unsigned long long)last.workspace, last.schemes, last.alignments[0],
                   last.alignments[1], last.alignments[2], last.alignments[3]);
  const char *names = "abcd";
  const void *pointers[] = {a, b, c, d};
  const Layout *layouts[] = {a_layout, b_layout, c_layout, d_layout};
  for (int i = 0; i < 4; ++i)
    at += sprintf(record + at, ", \"%c\": [%llu, %d, %llu, %llu, %lld]", names[i],
                  (unsigned long long)pointers[i], layouts[i]->type,
                  (unsigned long long)layouts[i]->rows, (unsigned long long)layouts[i]->cols,
                  (long long)layouts[i]->ld);
  sprintf(record + at, "}");
  return SUCCESS;
}
