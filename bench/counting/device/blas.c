/* cuBLAS and cuBLASLt: a call is logged with its shape and the bytes of its operands and result.
 * m, n and k are those of the call, so of column-major matrices: torch's (R x C) result has m = C. */
#include "device.h"

#include <cublasLt.h>
#include <cublas_api.h>
#include <stdlib.h>
#include <string.h>

static int bits_of(cudaDataType type) {
    switch (type) {
    case CUDA_R_64F: return 64;
    case CUDA_R_32F: return 32;
    case CUDA_R_16F:
    case CUDA_R_16BF: return 16;
    case CUDA_R_8F_E4M3:
    case CUDA_R_8F_E5M2:
    case CUDA_R_8I: return 8;
    default: refuse("a matrix of this type");
    }
}

static const char *letters(cublasOperation_t a, cublasOperation_t b) {
    static const char *const pairs[2][2] = {{"NN", "NT"}, {"TN", "TT"}};
    return pairs[a != CUBLAS_OP_N][b != CUBLAS_OP_N];
}

/* torch passes scalars by host address, as fp32 unless the matrices are fp64. */
static int reads_c(const void *beta, int bits) {
    return bits == 64 ? *(const double *)beta != 0 : *(const float *)beta != 0;
}

/* ---- handles ---- */

static void *fresh(size_t bytes) {
    void *made = calloc(1, bytes);
    if (!made)
        refuse("cuBLAS without host memory");
    return made;
}

struct blas {
    cudaStream_t stream;
};

static cudaStream_t stream_of(cublasHandle_t handle) { return ((struct blas *)handle)->stream; }

EXPORT cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) {
    *handle = fresh(sizeof(struct blas));
    return CUBLAS_STATUS_SUCCESS;
}
EXPORT cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) {
    free(handle);
    return CUBLAS_STATUS_SUCCESS;
}
EXPORT cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
    ((struct blas *)handle)->stream = stream;
    return CUBLAS_STATUS_SUCCESS;
}
EXPORT cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void *space, size_t bytes) {
    return CUBLAS_STATUS_SUCCESS;
}
EXPORT cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) {
    return CUBLAS_STATUS_SUCCESS;
}
EXPORT cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t *mode) {
    *mode = CUBLAS_DEFAULT_MATH;
    return CUBLAS_STATUS_SUCCESS;
}
EXPORT cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t *mode) {
    *mode = CUBLAS_POINTER_MODE_HOST;
    return CUBLAS_STATUS_SUCCESS;
}
EXPORT cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t mode) {
    if (mode != CUBLAS_POINTER_MODE_HOST)
        refuse("cuBLAS with scalars on the device");
    return CUBLAS_STATUS_SUCCESS;
}
EXPORT cublasStatus_t cublasSetSmCountTarget(cublasHandle_t handle, int count) {
    return CUBLAS_STATUS_SUCCESS;
}

/* ---- products ---- */

static cublasStatus_t product(cudaStream_t stream, const char *call, const char *operations, long m,
                              long n, long k, long batch, int bits_a, int bits_b, int bits_c,
                              int reads_c, const void *a, const void *b, const void *c) {
    if (capture_allows(call, stream))
        return CUBLAS_STATUS_EXECUTION_FAILED;
    log_gemm(call, operations, m, n, k, batch, bits_a, bits_b, bits_c, reads_c, a, b, c, stream);
    return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasGemmStridedBatchedEx(
    cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m, int n, int k,
    const void *alpha, const void *a, cudaDataType type_a, int lda, long long stride_a,
    const void *b, cudaDataType type_b, int ldb, long long stride_b, const void *beta, void *c,
    cudaDataType type_c, int ldc, long long stride_c, int batch, cublasComputeType_t compute,
    cublasGemmAlgo_t algorithm) {
    return product(stream_of(handle), "cublasGemmStridedBatchedEx", letters(op_a, op_b), m, n, k,
                   batch, bits_of(type_a), bits_of(type_b), bits_of(type_c), reads_c(beta,
                   bits_of(type_c)), a, b, c);
}
EXPORT cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t op_a,
                                   cublasOperation_t op_b, int m, int n, int k, const void *alpha,
                                   const void *a, cudaDataType type_a, int lda, const void *b,
                                   cudaDataType type_b, int ldb, const void *beta, void *c,
                                   cudaDataType type_c, int ldc, cublasComputeType_t compute,
                                   cublasGemmAlgo_t algorithm) {
    return product(stream_of(handle), "cublasGemmEx", letters(op_a, op_b), m, n, k, 1,
                   bits_of(type_a), bits_of(type_b), bits_of(type_c), reads_c(beta,
                   bits_of(type_c)), a, b, c);
}
EXPORT cublasStatus_t cublasSgemm_v2(cublasHandle_t handle, cublasOperation_t op_a,
                                     cublasOperation_t op_b, int m, int n, int k,
                                     const float *alpha, const float *a, int lda, const float *b,
                                     int ldb, const float *beta, float *c, int ldc) {
    return product(stream_of(handle), "cublasSgemm", letters(op_a, op_b), m, n, k, 1, 32, 32, 32,
                   reads_c(beta, 32), a, b, c);
}
EXPORT cublasStatus_t cublasSgemmStridedBatched(
    cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m, int n, int k,
    const float *alpha, const float *a, int lda, long long stride_a, const float *b, int ldb,
    long long stride_b, const float *beta, float *c, int ldc, long long stride_c, int batch) {
    return product(stream_of(handle), "cublasSgemmStridedBatched", letters(op_a, op_b), m, n, k,
                   batch, 32, 32, 32, reads_c(beta, 32), a, b, c);
}

/* ---- cuBLASLt: handles are ours, so their opaque types hold what a product's shape needs ---- */

struct layout {
    int bits;
    long rows, columns, batch;
};
struct operations {
    cublasOperation_t op_a, op_b;
};

EXPORT cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *out, cudaDataType type,
                                                 uint64_t rows, uint64_t columns, int64_t ld) {
    struct layout *made = fresh(sizeof *made);
    *made = (struct layout){bits_of(type), (long)rows, (long)columns, 1};
    *out = (cublasLtMatrixLayout_t)made;
    return CUBLAS_STATUS_SUCCESS;
}
EXPORT cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    free(layout);
    return CUBLAS_STATUS_SUCCESS;
}
EXPORT cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                       cublasLtMatrixLayoutAttribute_t attribute,
                                                       const void *value, size_t bytes) {
    if (attribute == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT)
        ((struct layout *)layout)->batch = *(const int32_t *)value;
    return CUBLAS_STATUS_SUCCESS;
}
EXPORT cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *out,
                                               cublasComputeType_t compute, cudaDataType scale) {
    *out = fresh(sizeof(struct operations)); /* both operations N */
    return CUBLAS_STATUS_SUCCESS;
}
EXPORT cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t description) {
    free(description);
    return CUBLAS_STATUS_SUCCESS;
}
EXPORT cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t description,
                                                     cublasLtMatmulDescAttributes_t attribute,
                                                     const void *value, size_t bytes) {
    struct operations *of = (struct operations *)description;
    if (attribute == CUBLASLT_MATMUL_DESC_TRANSA)
        of->op_a = *(const cublasOperation_t *)value;
    if (attribute == CUBLASLT_MATMUL_DESC_TRANSB)
        of->op_b = *(const cublasOperation_t *)value;
    return CUBLAS_STATUS_SUCCESS;
}
EXPORT cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *out) {
    *out = fresh(1);
    return CUBLAS_STATUS_SUCCESS;
}
EXPORT cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    free(preference);
    return CUBLAS_STATUS_SUCCESS;
}
EXPORT cublasStatus_t cublasLtMatmulPreferenceSetAttribute(
    cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute,
    const void *value, size_t bytes) {
    return CUBLAS_STATUS_SUCCESS;
}
EXPORT cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t description, cublasLtMatrixLayout_t a,
    cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
    cublasLtMatmulPreference_t preference, int wanted, cublasLtMatmulHeuristicResult_t results[],
    int *count) {
    memset(results, 0, sizeof results[0]);
    *count = 1;
    return CUBLAS_STATUS_SUCCESS;
}
EXPORT cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t description,
                                     const void *alpha, const void *a,
                                     cublasLtMatrixLayout_t layout_a, const void *b,
                                     cublasLtMatrixLayout_t layout_b, const void *beta,
                                     const void *c, cublasLtMatrixLayout_t layout_c, void *d,
                                     cublasLtMatrixLayout_t layout_d,
                                     const cublasLtMatmulAlgo_t *algorithm, void *workspace,
                                     size_t workspace_bytes, cudaStream_t stream) {
    const struct operations *of = (const struct operations *)description;
    const struct layout *left = (const struct layout *)layout_a;
    const struct layout *right = (const struct layout *)layout_b;
    const struct layout *result = (const struct layout *)layout_d;
    long k = of->op_a == CUBLAS_OP_N ? left->columns : left->rows;
    return product(stream, "cublasLtMatmul", letters(of->op_a, of->op_b), result->rows,
                   result->columns, k, result->batch, left->bits, right->bits, result->bits,
                   reads_c(beta, result->bits), a, b, d);
}

/* The rest of cuBLAS would run on handles that are not its own. */
#define NOT_COUNTED(name) EXPORT void name##_(void) __asm__(#name); \
    void name##_(void) { refuse(#name); }
NOT_COUNTED(cublasSgemmEx)
NOT_COUNTED(cublasDgemm_v2)
NOT_COUNTED(cublasDgemmStridedBatched)
NOT_COUNTED(cublasSgemv_v2)
NOT_COUNTED(cublasDgemv_v2)
NOT_COUNTED(cublasSdot_v2)
NOT_COUNTED(cublasDdot_v2)
NOT_COUNTED(cublasDotEx)
NOT_COUNTED(cublasStrsm_v2)
NOT_COUNTED(cublasDtrsm_v2)
NOT_COUNTED(cublasStrsmBatched)
NOT_COUNTED(cublasDtrsmBatched)
NOT_COUNTED(cublasSgetrfBatched)
NOT_COUNTED(cublasDgetrfBatched)
