// A CUDA runtime that executes no kernel: libcudart.so.13 as ONNX Runtime's CUDA provider needs it.
//
// Memory, copies and waits are real ones. Kernels are counted and not run, so no number that a session then reads means
// anything. What can be seen: that a graph loads, where its nodes are placed, that kernels take their arguments, what
// is copied, and that the host leaves the device's memory alone.
//
// The device's memory is one file in memory, mapped twice: at the addresses that callers get nothing may be read or
// written, as on a GPU, so that a host function that touches one ends the process. Copies go through the other mapping.
//
// What a stream is given while it is captured is recorded and not done; a launch of the graph does it. As on a GPU, a
// wait, a synchronous copy, memory taken or given back, and work on the default stream end a capture with an error.
//
// What a session of this project has no use for says cudaErrorNotSupported.

#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <vector>

#undef cudaGetDeviceProperties

namespace {

constexpr size_t kDeviceBytes = size_t{16} << 30;  // of addresses; only what is written to takes memory
constexpr size_t kAlignment = 256;                 // cudaMalloc's

// What happened since the last stub_take; tests/support/cuda_stub/worker.py reads them in this order
struct Counters {
  long long to_device_calls, to_device_bytes;
  long long to_host_calls, to_host_bytes;
  long long on_device_calls, on_device_bytes, on_device_largest;
  long long kernels;
  long long waits;
  long long captures, replays, replayed_kernels;
  long long variables;                // of kernels' modules that the host read
  long long held_bytes, held_graphs;  // of device memory, and CUDA graphs, now
};

class Device {
 public:
  Device() {
    const int file = memfd_create("device memory", 0);
    if (file < 0 || ftruncate(file, kDeviceBytes) != 0) die("no memory for the device");
    seen_ = map(PROT_NONE, file);
    shadow_ = map(PROT_READ | PROT_WRITE, file);
    close(file);
  }

  cudaError_t allocate(void** address, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (capturing_ != nullptr) return cudaErrorStreamCaptureUnsupported;
    const size_t size = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (size > kDeviceBytes - used_) return cudaErrorMemoryAllocation;
    *address = seen_ + used_;
    sizes_[*address] = size;
    used_ += size;  // an address is not given twice, so that what was freed is not mistaken for another buffer
    counters_.held_bytes += static_cast<long long>(size);
    return cudaSuccess;
  }

  cudaError_t release(void* address) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (address == nullptr) return cudaSuccess;
    if (capturing_ != nullptr) return cudaErrorStreamCaptureUnsupported;
    const auto found = sizes_.find(address);
    if (found == sizes_.end()) return cudaErrorInvalidValue;
    counters_.held_bytes -= static_cast<long long>(found->second);
    sizes_.erase(found);
    return cudaSuccess;
  }

  // Refuses a direction that is not that of the addresses, as the real one does
  cudaError_t copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (capturing_ != nullptr) return cudaErrorStreamCaptureUnsupported;
    const bool to_device = holds(to), from_device = holds(from);
    const cudaMemcpyKind real = to_device ? (from_device ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice)
                                          : (from_device ? cudaMemcpyDeviceToHost : cudaMemcpyHostToHost);
    if (kind != real && kind != cudaMemcpyDefault) return cudaErrorInvalidValue;
    const auto size = static_cast<long long>(bytes);
    if (real == cudaMemcpyHostToDevice) ++counters_.to_device_calls, counters_.to_device_bytes += size;
    if (real == cudaMemcpyDeviceToHost) ++counters_.to_host_calls, counters_.to_host_bytes += size;
    if (real == cudaMemcpyDeviceToDevice) {
      ++counters_.on_device_calls, counters_.on_device_bytes += size;
      counters_.on_device_largest = std::max(counters_.on_device_largest, size);
    }
    memmove(writable(to), writable(const_cast<void*>(from)), bytes);
    return cudaSuccess;
  }

  cudaError_t fill(void* to, int value, size_t bytes) {
    if (!holds(to)) return cudaErrorInvalidValue;
    memset(writable(to), value, bytes);
    return cudaSuccess;
  }

  // Of a kernel's module; all are zero here
  cudaError_t read_variable(void* to, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (capturing_ != nullptr) return cudaErrorStreamCaptureUnsupported;
    ++counters_.variables;
    memset(to, 0, bytes);
    return cudaSuccess;
  }

  bool holds(const void* address) const {
    return address >= seen_ && address < seen_ + kDeviceBytes;
  }

  cudaError_t count_kernel(cudaStream_t stream) {
    const auto run = [this] { return ++counters_.replayed_kernels, cudaSuccess; };
    return recorded_or(stream, run, [this] { return ++counters_.kernels, cudaSuccess; });
  }

  cudaError_t count_wait() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (capturing_ != nullptr) return cudaErrorStreamCaptureUnsupported;
    ++counters_.waits;
    return cudaSuccess;
  }

  // Done now, or when the graph runs for which the stream is captured
  cudaError_t enqueue(cudaStream_t stream, const std::function<cudaError_t()>& work) {
    return recorded_or(stream, work, work);
  }

  cudaError_t begin_capture(cudaStream_t stream) {
    if (stream == nullptr || capturing_ != nullptr) return cudaErrorStreamCaptureUnsupported;
    capturing_ = stream;
    recorded_.clear();
    return cudaSuccess;
  }

  cudaError_t end_capture(cudaStream_t stream, cudaGraph_t* graph) {
    if (capturing_ == nullptr || stream != capturing_) return cudaErrorStreamCaptureUnmatched;
    capturing_ = nullptr;
    const std::lock_guard<std::mutex> lock(mutex_);
    graphs_.push_back(recorded_);
    *graph = reinterpret_cast<cudaGraph_t>(graphs_.size());
    ++counters_.captures;
    return cudaSuccess;
  }

  cudaError_t replay(size_t number, cudaStream_t stream) {
    if (number == 0 || number > graphs_.size() || capturing_ != nullptr || stream == nullptr) return cudaErrorInvalidValue;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ++counters_.replays;
    }
    for (const auto& work : graphs_[number - 1]) {
      const cudaError_t error = work();
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }

  cudaError_t hold_graphs(int more) {
    const std::lock_guard<std::mutex> lock(mutex_);
    counters_.held_graphs += more;
    return cudaSuccess;
  }

  bool captures(cudaStream_t stream) const { return capturing_ != nullptr && stream == capturing_; }

  Counters take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Counters taken = counters_;
    counters_ = Counters{};
    counters_.held_bytes = taken.held_bytes;
    counters_.held_graphs = taken.held_graphs;
    return taken;
  }

 private:
  cudaError_t recorded_or(cudaStream_t stream, const std::function<cudaError_t()>& recorded,
                          const std::function<cudaError_t()>& now) {
    if (capturing_ == nullptr) return now();
    if (stream == nullptr) return cudaErrorStreamCaptureImplicit;
    if (stream != capturing_) return now();
    recorded_.push_back(recorded);
    return cudaSuccess;
  }

  [[noreturn]] static void die(const char* why) {
    fprintf(stderr, "CUDA stub: %s\n", why);
    abort();
  }

  static char* map(int protection, int file) {
    void* address = mmap(nullptr, kDeviceBytes, protection, MAP_SHARED | MAP_NORESERVE, file, 0);
    if (address == MAP_FAILED) die("no addresses for the device's memory");
    return static_cast<char*>(address);
  }

  void* writable(void* address) const {
    return holds(address) ? shadow_ + (static_cast<char*>(address) - seen_) : address;
  }

  char *seen_, *shadow_;
  size_t used_ = 0;
  std::map<void*, size_t> sizes_;
  cudaStream_t capturing_ = nullptr;
  std::vector<std::function<cudaError_t()>> recorded_;
  std::vector<std::vector<std::function<cudaError_t()>>> graphs_;  // of a number each, from 1
  Counters counters_{};
  std::mutex mutex_;
};

Device& device() {
  static Device* const made = new Device;  // never freed: the provider's own statics end after ours
  return *made;
}

// A handle is never looked into; it only has to differ from null and from the others
template <typename Handle>
cudaError_t new_handle(Handle* handle) {
  static std::mutex mutex;
  static size_t last = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  *handle = reinterpret_cast<Handle>(16 * ++last);
  return cudaSuccess;
}

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  void* stream;
};
thread_local Launch pushed;

}  // namespace

extern "C" {

void stub_take(Counters* counters) { *counters = device().take(); }

// ── the device: an H100 by its numbers ─────────────────────────────────────────────────────────────────────────────

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* number) {
  *number = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int number) { return number == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = kDeviceBytes / 2;
  *total = kDeviceBytes;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = cudaDeviceProp{};
  snprintf(properties->name, sizeof properties->name, "stub");
  properties->major = 9;
  properties->multiProcessorCount = 132;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->regsPerBlock = 65536;
  properties->totalGlobalMem = kDeviceBytes;
  properties->sharedMemPerBlock = 48 << 10;
  properties->sharedMemPerBlockOptin = 227 << 10;
  properties->sharedMemPerMultiprocessor = 228 << 10;
  properties->l2CacheSize = 50 << 20;
  for (int axis = 0; axis < 3; ++axis) {
    properties->maxGridSize[axis] = axis == 0 ? 2147483647 : 65535;
    properties->maxThreadsDim[axis] = axis == 2 ? 64 : 1024;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int number) {
  cudaDeviceProp properties;
  cudaGetDeviceProperties(&properties, number);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = properties.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = properties.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = properties.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = properties.maxThreadsPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = static_cast<int>(properties.sharedMemPerBlock); break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(properties.sharedMemPerBlockOptin); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(properties.sharedMemPerMultiprocessor);
      break;
    default: *value = 0;
  }
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  *attributes = cudaPointerAttributes{};
  const bool on_device = device().holds(address);
  attributes->type = on_device ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  attributes->devicePointer = on_device ? const_cast<void*>(address) : nullptr;
  return cudaSuccess;
}

// ── memory ─────────────────────────────────────────────────────────────────────────────────────────────────────────

cudaError_t cudaMalloc(void** address, size_t bytes) { return device().allocate(address, bytes); }
cudaError_t cudaMallocFromPoolAsync(void** address, size_t bytes, cudaMemPool_t, cudaStream_t) {
  return device().allocate(address, bytes);
}
cudaError_t cudaFree(void* address) { return device().release(address); }
cudaError_t cudaFreeAsync(void* address, cudaStream_t) { return device().release(address); }

cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) {
  return posix_memalign(address, kAlignment, bytes) == 0 ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaMallocHost(void** address, size_t bytes) { return cudaHostAlloc(address, bytes, 0); }
cudaError_t cudaFreeHost(void* address) {
  free(address);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return device().copy(to, from, bytes, kind);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return device().enqueue(stream, [=] { return device().copy(to, from, bytes, kind); });
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
  for (size_t row = 0; row < height; ++row) {
    const cudaError_t error = cudaMemcpyAsync(static_cast<char*>(to) + row * to_pitch,
                                              static_cast<const char*>(from) + row * from_pitch, width, kind, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) { return device().fill(to, value, bytes); }
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return device().enqueue(stream, [=] { return device().fill(to, value, bytes); });
}
cudaError_t cudaMemcpyFromSymbol(void* to, const void*, size_t bytes, size_t, cudaMemcpyKind) {
  return device().read_variable(to, bytes);
}
cudaError_t cudaMemPoolCreate(cudaMemPool_t*, const cudaMemPoolProps*) { return cudaErrorNotSupported; }
cudaError_t cudaMemPoolDestroy(cudaMemPool_t) { return cudaErrorNotSupported; }
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaErrorNotSupported; }
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaErrorNotSupported; }
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaErrorNotSupported; }

// ── streams and events: all work is done when it is asked for ──────────────────────────────────────────────────────

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return new_handle(stream); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return new_handle(stream); }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return device().count_wait(); }
cudaError_t cudaDeviceSynchronize(void) { return device().count_wait(); }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t* event) { return new_handle(event); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return new_handle(event); }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t, cudaStream_t, unsigned) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return device().count_wait(); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 0;
  return cudaSuccess;
}

// ── graphs ─────────────────────────────────────────────────────────────────────────────────────────────────────────

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = device().captures(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) { return device().begin_capture(stream); }
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) { return device().end_capture(stream, graph); }
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
  *made = reinterpret_cast<cudaGraphExec_t>(graph);
  return device().hold_graphs(1);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  return device().replay(reinterpret_cast<size_t>(graph), stream);
}
cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return device().hold_graphs(-1); }

// ── errors ─────────────────────────────────────────────────────────────────────────────────────────────────────────

cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t error) { return error == cudaSuccess ? "cudaSuccess" : "an error of the stub"; }
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

// ── kernels: counted, not run ──────────────────────────────────────────────────────────────────────────────────────

cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return device().count_kernel(stream);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return device().count_kernel(stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return device().count_kernel(stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  return device().count_kernel(config->stream);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  if (device().captures(stream)) return cudaErrorNotSupported;
  function(data);
  return cudaSuccess;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, struct CUstream_st* stream) {
  pushed = {grid, block, shared_bytes, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared_bytes = pushed.shared_bytes;
  *static_cast<void**>(stream) = pushed.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = cudaFuncAttributes{};
  attributes->maxThreadsPerBlock = 1024;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t, cudaFuncAttribute, int, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 2;
  return cudaSuccess;
}

// Called when the provider is loaded, for every kernel in it
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*, dim3*, int*) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

cudaError_t cudaLibraryLoadData(cudaLibrary_t* library, const void*, cudaJitOption*, void**, unsigned,
                                cudaLibraryOption*, void**, unsigned) {
  return new_handle(library);
}
cudaError_t cudaLibraryUnload(cudaLibrary_t) { return cudaSuccess; }
cudaError_t cudaLibraryGetKernel(cudaKernel_t* kernel, cudaLibrary_t, const char*) { return new_handle(kernel); }
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = nullptr;
  if (result != nullptr) *result = cudaDriverEntryPointSymbolNotFound;
  return cudaErrorNotSupported;
}

}  // extern "C"
