// cuBLAS, cuBLASLt, cuRAND and the driver, as ONNX Runtime's CUDA provider needs them: every call says that all is
// well, and none computes. Built once a library, with -DSTUB_CUBLAS, -DSTUB_CUBLASLT, -DSTUB_CURAND or -DSTUB_DRIVER.

// Makes an object, whose handle nothing looks into
#define MAKES(name)                            \
  int name(void** handle) {                    \
    *handle = reinterpret_cast<void*>(0x10);   \
    return 0;                                  \
  }
#define SAYS_OK(name) \
  int name() { return 0; }

extern "C" {

#ifdef STUB_CUBLAS
MAKES(cublasCreate_v2)
SAYS_OK(cublasDestroy_v2)
SAYS_OK(cublasSetStream_v2)
SAYS_OK(cublasGetMathMode)
SAYS_OK(cublasSetMathMode)
SAYS_OK(cublasDcopy_v2)
SAYS_OK(cublasScopy_v2)
SAYS_OK(cublasSscal_v2)
SAYS_OK(cublasSgeam)
SAYS_OK(cublasDgeam)
SAYS_OK(cublasSgemm_v2)
SAYS_OK(cublasDgemm_v2)
SAYS_OK(cublasGemmEx)
SAYS_OK(cublasSgemmBatched)
SAYS_OK(cublasDgemmBatched)
SAYS_OK(cublasGemmBatchedEx)
SAYS_OK(cublasSgemmStridedBatched)
SAYS_OK(cublasDgemmStridedBatched)
SAYS_OK(cublasGemmStridedBatchedEx)
SAYS_OK(cublasSgetrfBatched)
SAYS_OK(cublasDgetrfBatched)
SAYS_OK(cublasSgetriBatched)
SAYS_OK(cublasDgetriBatched)
const char* cublasGetStatusName(int) { return "a status of the stub"; }
const char* cublasGetStatusString(int) { return "a status of the stub"; }
#endif

#ifdef STUB_CUBLASLT
MAKES(cublasLtCreate)
SAYS_OK(cublasLtDestroy)
MAKES(cublasLtMatmulDescCreate)
SAYS_OK(cublasLtMatmulDescDestroy)
SAYS_OK(cublasLtMatmulDescSetAttribute)
MAKES(cublasLtMatmulPreferenceCreate)
SAYS_OK(cublasLtMatmulPreferenceDestroy)
SAYS_OK(cublasLtMatmulPreferenceSetAttribute)
MAKES(cublasLtMatrixLayoutCreate)
SAYS_OK(cublasLtMatrixLayoutDestroy)
SAYS_OK(cublasLtMatrixLayoutSetAttribute)
MAKES(cublasLtMatrixTransformDescCreate)
SAYS_OK(cublasLtMatrixTransformDescDestroy)
SAYS_OK(cublasLtMatrixTransform)
SAYS_OK(cublasLtMatmulAlgoInit)
SAYS_OK(cublasLtMatmulAlgoGetHeuristic)
SAYS_OK(cublasLtMatmulAlgoConfigSetAttribute)
SAYS_OK(cublasLtMatmul)
#endif

#ifdef STUB_CURAND
MAKES(curandCreateGenerator)
#endif

#ifdef STUB_DRIVER
SAYS_OK(cuInit)
SAYS_OK(cuTensorMapEncodeTiled)
#endif

}  // extern "C"
