// A GPU that computes nothing, for machines without one: the functions of CUDA's runtime and driver, NVML, cuBLAS, cuDNN,
// cuFFT, NCCL (of one rank) and CUPTI that PyTorch and Triton call. Preloaded, it lets a PyTorch built for CUDA run all
// that it runs on a GPU but for the numbers.
//
// Its memory is the host's and filled with zeros; copies from and to the host are made, kernels do nothing, and all is
// done in the moment when it is launched. Streams, events and captures keep CUDA's rules: what may not be done during a
// capture fails and spoils it, as do streams that have not come back when it ends. Launches show up in torch.profiler.
#define __CUDA_RUNTIME_API_H__  // its prototypes are of no use here, only its types
#include <driver_types.h>
typedef void (*cudaStreamCallback_t)(cudaStream_t, cudaError_t, void *);
typedef void (*cudaLogsCallback_t)(void *, int, char *, size_t);
#include <cupti.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include <map>
#include <mutex>
#include <set>
#include <string>

#define API extern "C" __attribute__((visibility("default")))
#define NOTHING(name) \
    API int name() { return 0; }

static std::recursive_mutex mutex;
typedef std::lock_guard<std::recursive_mutex> Lock;
static thread_local int last_error = 0;

static int fail(int error) { return last_error = error; }

static double milliseconds() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec * 1e-6;
}

// Streams and captures.

struct Capture;
struct Stream {
    Capture *capture = nullptr;
    long operations = 0, joined = 0;  // of a capture; those that other streams wait for
    int priority = 0;
};
struct Capture {
    Stream *origin;
    std::set<Stream *> members;
    int mode;
    unsigned long long id;
    pthread_t thread;
    bool is_broken = false;
    std::multimap<std::string, std::string> launches;  // kind, name
};
struct Event {
    Capture *capture = nullptr;
    Stream *stream = nullptr;
    long operations = 0;
    bool is_recorded = false;
    double at = 0;
};
static std::set<Capture *> captures;
static Stream legacy, per_thread;
static thread_local int thread_mode = cudaStreamCaptureModeGlobal;

static Stream *stream_of(void *stream) {
    return stream == nullptr || stream == (void *)1 ? &legacy : stream == (void *)2 ? &per_thread : (Stream *)stream;
}

static void show_to_profiler(const std::string &kind, const std::string &name);

static int launch(void *stream, const char *kind, const std::string &name) {
    Lock lock(mutex);
    Stream *on = stream_of(stream);
    for (Capture *each : captures)
        if (on == &legacy && each->mode == cudaStreamCaptureModeGlobal) {
            each->is_broken = true;
            return fail(cudaErrorStreamCaptureImplicit);
        }
    if (!on->capture) {
        show_to_profiler(kind, name);
        return 0;
    }
    if (on->capture->is_broken) return fail(cudaErrorStreamCaptureInvalidated);
    on->operations++;
    on->capture->launches.emplace(kind, name);
    return 0;
}

// What no thread may do during a capture unless it has asked for the relaxed mode.
static int not_while_capturing(void *stream = nullptr) {
    Lock lock(mutex);
    int error = 0;
    for (Capture *each : captures) {
        bool is_own = pthread_equal(each->thread, pthread_self());
        bool forbids = each->mode == cudaStreamCaptureModeGlobal || (each->mode == cudaStreamCaptureModeThreadLocal && is_own);
        if ((forbids && thread_mode != cudaStreamCaptureModeRelaxed) || (stream && stream_of(stream)->capture == each)) {
            each->is_broken = true;
            error = fail(cudaErrorStreamCaptureUnsupported);
        }
    }
    return error;
}

static int new_stream(Stream **stream, int priority) {
    *stream = new Stream;
    (*stream)->priority = priority;
    return 0;
}
API int cudaStreamCreate(Stream **stream) { return new_stream(stream, 0); }
API int cudaStreamCreateWithFlags(Stream **stream, unsigned) { return new_stream(stream, 0); }
API int cudaStreamCreateWithPriority(Stream **stream, unsigned, int priority) { return new_stream(stream, priority); }
NOTHING(cudaStreamDestroy)
API int cudaStreamGetPriority(void *stream, int *priority) { return *priority = stream_of(stream)->priority, 0; }
API int cudaStreamQuery(void *stream) { return not_while_capturing(stream); }
API int cudaStreamSynchronize(void *stream) { return not_while_capturing(stream); }
API int cudaDeviceSynchronize() { return not_while_capturing(); }
API int cudaStreamAddCallback(void *stream, void (*call)(void *, int, void *), void *data, unsigned) {
    return call(stream, 0, data), 0;
}
API int cudaLaunchHostFunc(void *, void (*call)(void *), void *data) { return call(data), 0; }

API int cudaEventCreate(Event **event) { return *event = new Event, 0; }
API int cudaEventCreateWithFlags(Event **event, unsigned) { return *event = new Event, 0; }
API int cudaEventDestroy(Event *event) { return delete event, 0; }
API int cudaEventRecord(Event *event, void *stream) {
    Lock lock(mutex);
    Stream *on = stream_of(stream);
    if (on->capture && on->capture->is_broken) return fail(cudaErrorStreamCaptureInvalidated);
    *event = {on->capture, on, on->operations, true, milliseconds()};
    return 0;
}
API int cudaEventRecordWithFlags(Event *event, void *stream, unsigned) { return cudaEventRecord(event, stream); }
static int ask(Event *event) {
    if (int error = not_while_capturing()) return error;
    return event->capture ? fail(cudaErrorCapturedEvent) : 0;
}
API int cudaEventQuery(Event *event) { return ask(event); }
API int cudaEventSynchronize(Event *event) { return ask(event); }
API int cudaEventElapsedTime(float *time, Event *from, Event *to) {
    if (!from->is_recorded || !to->is_recorded) return fail(cudaErrorInvalidResourceHandle);
    if (from->capture || to->capture) return fail(cudaErrorCapturedEvent);
    *time = to->at > from->at ? to->at - from->at : 1e-4;
    return 0;
}
API int cudaStreamWaitEvent(void *stream, Event *event, unsigned) {
    Lock lock(mutex);
    Stream *on = stream_of(stream);
    if (!event->is_recorded || (!event->capture && !on->capture)) return 0;
    if (!event->capture) {
        on->capture->is_broken = true;
        return fail(cudaErrorStreamCaptureIsolation);
    }
    if (!captures.count(event->capture)) return fail(cudaErrorCapturedEvent);
    if (!on->capture) {
        on->capture = event->capture;
        on->operations = on->joined = 0;
        event->capture->members.insert(on);
    } else if (on->capture != event->capture) {
        on->capture->is_broken = event->capture->is_broken = true;
        return fail(cudaErrorStreamCaptureMerge);
    }
    if (event->stream != on && event->operations > event->stream->joined) event->stream->joined = event->operations;
    on->operations++;
    return 0;
}

API int cudaThreadExchangeStreamCaptureMode(int *mode) { return std::swap(*mode, thread_mode), 0; }
API int cudaStreamBeginCapture(void *stream, int mode) {
    Lock lock(mutex);
    static unsigned long long count = 0;
    Stream *on = stream_of(stream);
    if (on == &legacy) return fail(cudaErrorStreamCaptureUnsupported);
    if (on->capture) return fail(cudaErrorIllegalState);
    on->capture = new Capture{on, {on}, mode, ++count, pthread_self()};
    on->operations = on->joined = 0;
    captures.insert(on->capture);
    return 0;
}
API int cudaStreamEndCapture(void *stream, Capture **graph) {
    Lock lock(mutex);
    *graph = nullptr;
    Capture *capture = stream_of(stream)->capture;
    if (!capture) return fail(cudaErrorIllegalState);
    bool all_joined = true;
    for (Stream *each : capture->members) {
        all_joined &= each == capture->origin || each->operations <= each->joined;
        each->capture = nullptr;
    }
    captures.erase(capture);
    if (capture->is_broken) return fail(cudaErrorStreamCaptureInvalidated);
    if (!all_joined) return fail(cudaErrorStreamCaptureUnjoined);
    *graph = capture;
    return 0;
}
API int cudaStreamIsCapturing(void *stream, int *status) {
    Lock lock(mutex);
    Capture *capture = stream_of(stream)->capture;
    *status = !capture ? cudaStreamCaptureStatusNone
              : capture->is_broken ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
    return 0;
}
API int cudaStreamGetCaptureInfo(
    void *stream, int *status, unsigned long long *id, Capture **graph, void **nodes, void **edges, size_t *count
) {
    Lock lock(mutex);
    Capture *capture = stream_of(stream)->capture;
    if (id) *id = capture ? capture->id : 0;
    if (graph) *graph = capture;
    if (nodes) *nodes = nullptr;
    if (edges) *edges = nullptr;
    if (count) *count = 0;
    return cudaStreamIsCapturing(stream, status);
}
API int cudaGraphInstantiate(Capture **executable, Capture *graph) { return *executable = graph, 0; }
API int cudaGraphInstantiateWithFlags(Capture **executable, Capture *graph) { return *executable = graph, 0; }
API int cudaGraphLaunch(Capture *graph, void *stream) {
    for (auto &each : graph->launches)
        if (int error = launch(stream, each.first.c_str(), each.second)) return error;
    return 0;
}
API int cudaGraphGetNodes(Capture *graph, void *, size_t *count) { return *count = graph->launches.size(), 0; }
NOTHING(cudaGraphDestroy)
NOTHING(cudaGraphExecDestroy)
NOTHING(cudaStreamUpdateCaptureDependencies)

// The device.

static const char NAME[] = "idle GPU of sm_90";
static const size_t MEMORY = 140ull << 30;

NOTHING(cudaSetDevice)
NOTHING(cudaDeviceEnablePeerAccess)
NOTHING(cudaProfilerStart)
NOTHING(cudaProfilerStop)
API int cudaGetDeviceCount(int *count) { return *count = 1, 0; }
API int cudaGetDevice(int *device) { return *device = 0, 0; }
API int cudaDriverGetVersion(int *version) { return *version = 13020, 0; }
API int cudaRuntimeGetVersion(int *version) { return *version = 13020, 0; }
API int cudaDeviceCanAccessPeer(int *can, int, int) { return *can = 0, 0; }
API int cudaDeviceGetPCIBusId(char *id, int size, int) { return snprintf(id, size, "0000:00:00.0"), 0; }
API int cudaDeviceGetDefaultMemPool(void **pool, int) { return *pool = (void *)8, 0; }
API int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return 0;
}
API int cudaPeekAtLastError() { return last_error; }
API int cudaGetLastError() {
    int error = last_error;
    last_error = 0;
    return error;
}
API const char *cudaGetErrorName(int) { return "an error of the idle GPU"; }
API const char *cudaGetErrorString(int error) {
    static const std::map<int, const char *> texts = {
        {cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"},
        {cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture"},
        {cudaErrorStreamCaptureImplicit, "operation would make the legacy stream depend on a capturing blocking stream"},
        {cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work"},
        {cudaErrorMemoryAllocation, "out of memory"},
    };
    auto found = texts.find(error);
    return found == texts.end() ? "idle GPU" : found->second;
}
API int cudaGetDeviceProperties(cudaDeviceProp *of, int) {
    memset(of, 0, sizeof *of);
    strcpy(of->name, NAME);
    of->major = 9;
    of->totalGlobalMem = MEMORY;
    of->multiProcessorCount = 132;
    of->warpSize = 32;
    of->maxThreadsPerBlock = of->maxThreadsDim[0] = of->maxThreadsDim[1] = 1024;
    of->maxThreadsDim[2] = 64;
    of->maxGridSize[0] = 2147483647;
    of->maxGridSize[1] = of->maxGridSize[2] = 65535;
    of->maxThreadsPerMultiProcessor = 2048;
    of->maxBlocksPerMultiProcessor = 32;
    of->regsPerBlock = of->regsPerMultiprocessor = 65536;
    of->sharedMemPerBlock = 49152;
    of->sharedMemPerBlockOptin = 232448;
    of->sharedMemPerMultiprocessor = 233472;
    of->l2CacheSize = 50 << 20;
    of->textureAlignment = 512;
    of->unifiedAddressing = of->concurrentKernels = of->managedMemory = 1;
    return 0;
}
static int attribute(int number) {
    static const std::map<int, int> values = {
        {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK, 1024}, {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X, 1024},
        {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y, 1024}, {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z, 64},
        {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X, 2147483647}, {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y, 65535},
        {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z, 65535}, {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK, 49152},
        {CU_DEVICE_ATTRIBUTE_WARP_SIZE, 32}, {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK, 65536},
        {CU_DEVICE_ATTRIBUTE_CLOCK_RATE, 1980000}, {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 132},
        {CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, 3201000}, {CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH, 6144},
        {CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, 50 << 20}, {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR, 2048},
        {CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, 1}, {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 9},
        {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, 233472},
        {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR, 65536}, {CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH, 1},
        {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 232448},
        {CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, 1},
    };
    auto found = values.find(number);
    return found == values.end() ? 0 : found->second;
}
API int cudaDeviceGetAttribute(int *value, int number, int) { return *value = attribute(number), 0; }

// Memory.

static std::map<char *, size_t> on_device, pinned;
static size_t used = 0;

static bool is_in(const std::map<char *, size_t> &blocks, const void *address) {
    Lock lock(mutex);
    auto next = blocks.upper_bound((char *)address);
    return next != blocks.begin() && (char *)address < std::prev(next)->first + std::prev(next)->second;
}
static void *reserve(size_t size) {
    Lock lock(mutex);
    void *block = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (block == MAP_FAILED) return nullptr;
    on_device[(char *)block] = size;
    return block;
}
static int allocate(void **address, size_t size) {
    size = ((size ? size : 1) + 511) / 512 * 512;
    *address = used + size > MEMORY ? nullptr : reserve(size);
    if (!*address) return fail(cudaErrorMemoryAllocation);
    used += size;
    return 0;
}
static int release(void *address) {
    Lock lock(mutex);
    auto found = on_device.find((char *)address);
    if (found == on_device.end()) return address ? fail(cudaErrorInvalidValue) : 0;
    munmap(address, found->second);
    used -= found->second;
    on_device.erase(found);
    return 0;
}
static int pin(void **address, size_t size) {
    if (int error = not_while_capturing()) return error;
    Lock lock(mutex);
    *address = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
    pinned[(char *)*address] = size;
    return 0;
}
API int cudaMalloc(void **address, size_t size) {
    int error = not_while_capturing();
    return error ? error : allocate(address, size);
}
API int cudaFree(void *address) {
    int error = not_while_capturing();
    return error ? error : release(address);
}
API int cudaMallocAsync(void **address, size_t size, void *) { return allocate(address, size); }
API int cudaFreeAsync(void *address, void *) { return release(address); }
API int cudaHostAlloc(void **address, size_t size, unsigned) { return pin(address, size); }
API int cudaMallocHost(void **address, size_t size) { return pin(address, size); }
API int cudaHostRegister(void *address, size_t size, unsigned) {
    Lock lock(mutex);
    return pinned[(char *)address] = size, 0;
}
API int cudaHostUnregister(void *address) {
    Lock lock(mutex);
    return pinned.erase((char *)address), 0;
}
API int cudaFreeHost(void *address) {
    cudaHostUnregister(address);
    return free(address), 0;
}
API int cudaMemGetInfo(size_t *free, size_t *total) { return *free = MEMORY - used, *total = MEMORY, 0; }
API int cudaPointerGetAttributes(cudaPointerAttributes *of, const void *address) {
    memset(of, 0, sizeof *of);
    bool is_device = is_in(on_device, address), is_pinned = is_in(pinned, address);
    of->type = is_device ? cudaMemoryTypeDevice : is_pinned ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    if (is_device || is_pinned) of->devicePointer = (void *)address;
    if (!is_device) of->hostPointer = (void *)address;
    return 0;
}
static int copy(void *to, const void *from, size_t size, void *stream) {
    if (int error = launch(stream, "copy", "copy")) return error;
    // Within the device nothing depends on what is there; a flag or a scale may be asked for.
    if (size <= 4096 || !is_in(on_device, to) || !is_in(on_device, from)) memmove(to, from, size);
    return 0;
}
API int cudaMemcpyAsync(void *to, const void *from, size_t size, int, void *stream) {
    return copy(to, from, size, stream);
}
API int cudaMemcpy(void *to, const void *from, size_t size, int) {
    int error = not_while_capturing();
    return error ? error : copy(to, from, size, nullptr);
}
API int cudaMemsetAsync(void *address, int value, size_t size, void *stream) {
    if (int error = launch(stream, "fill", "fill")) return error;
    if (size <= 4096) memset(address, value, size);
    return 0;
}
API int cudaMemset(void *address, int value, size_t size) {
    int error = not_while_capturing();
    return error ? error : cudaMemsetAsync(address, value, size, nullptr);
}

// Kernels of the runtime.

static std::map<const void *, std::string> &kernels() {  // registered before this library's own variables are made
    static auto *names = new std::map<const void *, std::string>;
    return *names;
}
struct Configuration {
    dim3 grid, block;
    size_t shared;
    void *stream;
};
static thread_local Configuration configuration;

API void **__cudaRegisterFatBinary(void *) {
    static void *handle[2];
    return handle;
}
API void __cudaRegisterFunction(void **, const void *function, char *, const char *name) { kernels()[function] = name; }
NOTHING(__cudaRegisterFatBinaryEnd)
NOTHING(__cudaUnregisterFatBinary)
NOTHING(__cudaRegisterVar)
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    configuration = {grid, block, shared, stream};
    return 0;
}
API int __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void **stream) {
    *grid = configuration.grid, *block = configuration.block;
    *shared = configuration.shared, *stream = configuration.stream;
    return 0;
}
static int launch_grid(unsigned x, unsigned y, unsigned z, unsigned threads, void *stream, const std::string &name) {
    bool fits = x && y && z && y <= 65535 && z <= 65535 && threads && threads <= 1024;
    return fits ? launch(stream, "kernel", name) : fail(cudaErrorInvalidConfiguration);
}
API int cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **, size_t, void *stream) {
    unsigned threads = block.x * block.y * block.z;
    return launch_grid(grid.x, grid.y, grid.z, threads, stream, kernels()[function]);
}
API int __cudaGetKernel(const void **kernel, const void *function) { return *kernel = function, 0; }
API int __cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, void *stream) {
    return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
API int cudaLaunchKernelExC(const cudaLaunchConfig_t *with, const void *function, void **arguments) {
    return cudaLaunchKernel(function, with->gridDim, with->blockDim, arguments, 0, with->stream);
}
API int cudaFuncGetAttributes(cudaFuncAttributes *of, const void *) {
    memset(of, 0, sizeof *of);
    of->maxThreadsPerBlock = 1024;
    of->numRegs = 32;
    of->ptxVersion = of->binaryVersion = 90;
    of->maxDynamicSharedSizeBytes = 49152;
    return 0;
}
NOTHING(cudaFuncSetAttribute)
NOTHING(cudaKernelSetAttributeForDevice)
API int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *count, const void *, int threads, size_t) {
    return *count = threads ? 2048 / threads : 1, 0;
}
API int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *f, int threads, size_t s, unsigned) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(count, f, threads, s);
}
API int cudaGetSymbolAddress(void **address, const void *symbol) {
    static std::map<const void *, void *> known;
    Lock lock(mutex);
    if (!known.count(symbol)) allocate(&known[symbol], 1 << 20);
    return *address = known[symbol], 0;
}

// The driver, as Triton and torch's allocator call it.

static CUresult result(int error) { return (CUresult)error; }
static int answer() { return 0; }

API CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
API CUresult cuDriverGetVersion(int *version) { return *version = 13020, CUDA_SUCCESS; }
API CUresult cuDeviceGet(CUdevice *device, int) { return *device = 0, CUDA_SUCCESS; }
API CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
API CUresult cuDeviceGetName(char *name, int size, CUdevice) { return snprintf(name, size, NAME), CUDA_SUCCESS; }
API CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute number, CUdevice) {
    return *value = attribute(number), CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice) { return *context = (CUcontext)8, CUDA_SUCCESS; }
API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned *flags, int *active) {
    return *flags = 0, *active = 1, CUDA_SUCCESS;
}
API CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)8, CUDA_SUCCESS; }
API CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
API CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
API CUresult cuCtxGetLimit(size_t *value, CUlimit) { return *value = 8 << 20, CUDA_SUCCESS; }
API CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
API CUresult cuGetErrorString(CUresult error, const char **text) {
    return *text = cudaGetErrorString(error), CUDA_SUCCESS;
}
API CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    return result(cudaStreamIsCapturing(stream, (int *)status));
}
API CUresult cuStreamSynchronize(CUstream stream) { return result(cudaStreamSynchronize(stream)); }
API CUresult cuModuleLoadData(CUmodule *module, const void *) { return *module = (CUmodule)8, CUDA_SUCCESS; }
API CUresult cuModuleLoadDataEx(CUmodule *module, const void *, unsigned, CUjit_option *, void **) {
    return *module = (CUmodule)8, CUDA_SUCCESS;
}
API CUresult cuModuleLoad(CUmodule *module, const char *) { return *module = (CUmodule)8, CUDA_SUCCESS; }
API CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
API CUresult cuModuleGetFunction(CUfunction *function, CUmodule, const char *name) {
    return *function = (CUfunction) new std::string(name), CUDA_SUCCESS;
}
API CUresult cuFuncGetAttribute(int *value, CUfunction_attribute number, CUfunction) {
    *value = number == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : number == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0;
    return CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
API CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
API CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction, const CUlaunchConfig *) {
    return *count = 1, CUDA_SUCCESS;
}
API CUresult cuLaunchKernel(
    CUfunction function, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y, unsigned block_z,
    unsigned, CUstream stream, void **, void **
) {
    return result(launch_grid(x, y, z, block_x * block_y * block_z, stream, *(std::string *)function));
}
API CUresult cuLaunchKernelEx(const CUlaunchConfig *with, CUfunction function, void **, void **) {
    unsigned threads = with->blockDimX * with->blockDimY * with->blockDimZ;
    std::string &name = *(std::string *)function;
    return result(launch_grid(with->gridDimX, with->gridDimY, with->gridDimZ, threads, with->hStream, name));
}
API CUresult cuPointerGetAttribute(void *value, CUpointer_attribute number, CUdeviceptr address) {
    if (number == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) {
        *(CUdeviceptr *)value = address;
        bool is_known = is_in(on_device, (void *)address) || is_in(pinned, (void *)address);
        return is_known ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
    }
    return *(int *)value = 0, CUDA_SUCCESS;
}
API CUresult cuMemAddressReserve(CUdeviceptr *address, size_t size, size_t, CUdeviceptr, unsigned long long) {
    *address = (CUdeviceptr)reserve(size);
    return *address ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
API CUresult cuMemAddressFree(CUdeviceptr address, size_t size) {
    Lock lock(mutex);
    on_device.erase((char *)address);
    return munmap((void *)address, size), CUDA_SUCCESS;
}
API CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *, unsigned long long) {
    if (used + size > MEMORY) return CUDA_ERROR_OUT_OF_MEMORY;
    return used += *handle = size, CUDA_SUCCESS;
}
API CUresult cuMemRelease(CUmemGenericAllocationHandle handle) { return used -= handle, CUDA_SUCCESS; }
API CUresult cuMemMap(CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long) {
    return CUDA_SUCCESS;
}
API CUresult cuMemUnmap(CUdeviceptr address, size_t size) {
    return madvise((void *)address, size, MADV_DONTNEED), CUDA_SUCCESS;
}
API CUresult cuMemSetAccess(CUdeviceptr, size_t, const CUmemAccessDesc *, size_t) { return CUDA_SUCCESS; }
API CUresult cuMemGetAllocationGranularity(size_t *size, const CUmemAllocationProp *, CUmemAllocationGranularity_flags) {
    return *size = 2 << 20, CUDA_SUCCESS;
}
API int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned, unsigned long long, int *status) {
    void *own = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    *function = dlsym(own, name);
    if (!*function) *function = (void *)answer;
    if (status) *status = cudaDriverEntryPointSuccess;
    return 0;
}
// What has to be there and is not called, with prototypes that are no use here.
asm(".globl cuTensorMapEncodeTiled, cuLinkCreate_v2, cuLinkAddData_v2, cuLinkComplete\n"
    "cuTensorMapEncodeTiled: cuLinkCreate_v2: cuLinkAddData_v2: cuLinkComplete: mov $801, %eax\n ret");

// NVML.

NOTHING(nvmlInit_v2)
API const char *nvmlErrorString(int) { return NAME; }
API int nvmlDeviceGetHandleByPciBusId_v2(const char *, void **device) { return *device = (void *)8, 0; }
API int nvmlDeviceGetHandleByUUID(const char *, void **device) { return *device = (void *)8, 0; }
API int nvmlDeviceGetGpuFabricInfoV(void *, void *) { return 3; }  // not supported
API int nvmlDeviceGetNvLinkRemoteDeviceType(void *, unsigned, int *) { return 3; }
API int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *, unsigned, void *) { return 3; }
API int nvmlDeviceGetComputeRunningProcesses(void *, unsigned *count, void *) { return *count = 0; }
API int nvmlSystemGetCudaDriverVersion_v2(int *version) { return *version = 13020, 0; }
API int nvmlDeviceGetTotalEnergyConsumption(void *, unsigned long long *millijoules) {
    return *millijoules = milliseconds() * 100, 0;
}

// Libraries: handles know their stream.

struct Handle {
    void *stream = nullptr;
    int math_mode = 0, pointer_mode = 0;
};
static int describe(void **descriptor) { return *descriptor = calloc(1, 1024), 0; }
#define WORK(library, name, error) \
    API int name(Handle *handle) { return launch(handle->stream, library, #name) ? error : 0; }
#define DESCRIPTOR(create) \
    API int create(void **descriptor) { return describe(descriptor); }

API int cublasCreate_v2(Handle **handle) { return *handle = new Handle, 0; }
NOTHING(cublasDestroy_v2)
NOTHING(cublasSetWorkspace_v2)
API int cublasSetStream_v2(Handle *handle, void *stream) { return handle->stream = stream, 0; }
API int cublasGetMathMode(Handle *handle, int *mode) { return *mode = handle->math_mode, 0; }
API int cublasSetMathMode(Handle *handle, int mode) { return handle->math_mode = mode, 0; }
API int cublasGetPointerMode_v2(Handle *handle, int *mode) { return *mode = handle->pointer_mode, 0; }
API int cublasSetPointerMode_v2(Handle *handle, int mode) { return handle->pointer_mode = mode, 0; }
WORK("cublas", cublasGemmEx, 14)
WORK("cublas", cublasGemmStridedBatchedEx, 14)
WORK("cublas", cublasSgemmEx, 14)
WORK("cublas", cublasSgemm_v2, 14)
WORK("cublas", cublasSgemmStridedBatched, 14)
WORK("cublas", cublasSgemv_v2, 14)
WORK("cublas", cublasSdot_v2, 14)
WORK("cublas", cublasDotEx, 14)
WORK("cublas", cublasDgemm_v2, 14)
WORK("cublas", cublasDgemmStridedBatched, 14)
WORK("cublas", cublasDgemv_v2, 14)
WORK("cublas", cublasDdot_v2, 14)
DESCRIPTOR(cublasLtMatmulDescCreate)
DESCRIPTOR(cublasLtMatmulPreferenceCreate)
DESCRIPTOR(cublasLtMatrixLayoutCreate)
NOTHING(cublasLtMatmulDescDestroy)
NOTHING(cublasLtMatmulPreferenceDestroy)
NOTHING(cublasLtMatrixLayoutDestroy)
NOTHING(cublasLtMatmulDescSetAttribute)
NOTHING(cublasLtMatmulPreferenceSetAttribute)
NOTHING(cublasLtMatrixLayoutSetAttribute)
API int cublasLtMatmulAlgoGetHeuristic(
    void *, void *, void *, void *, void *, void *, void *, int, void *results, int *count
) {
    return memset(results, 0, 64 + 8 + 4), *count = 1, 0;  // an algorithm, no workspace, success
}
API int cublasLtMatmul(
    void *, void *, void *, void *, void *, void *, void *, void *, void *, void *, void *, void *, void *, void *,
    size_t, void *stream
) {
    return launch(stream, "cublas", "cublasLtMatmul") ? 14 : 0;
}

API int cudnnCreate(Handle **handle) { return *handle = new Handle, 0; }
API int cudnnSetStream(Handle *handle, void *stream) { return handle->stream = stream, 0; }
API int cudnnGetStream(Handle *handle, void **stream) { return *stream = handle->stream, 0; }
DESCRIPTOR(cudnnCreateTensorDescriptor)
DESCRIPTOR(cudnnCreateFilterDescriptor)
DESCRIPTOR(cudnnCreateActivationDescriptor)
NOTHING(cudnnDestroyTensorDescriptor)
NOTHING(cudnnDestroyFilterDescriptor)
NOTHING(cudnnDestroyActivationDescriptor)
NOTHING(cudnnSetTensorNdDescriptor)
NOTHING(cudnnSetFilterNdDescriptor)
NOTHING(cudnnSetActivationDescriptor)
WORK("cudnn", cudnnBatchNormalizationForwardTrainingEx, 5000)
WORK("cudnn", cudnnBatchNormalizationBackwardEx, 5000)
WORK("cudnn", cudnnBatchNormalizationForwardInference, 5000)
API int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(
    void *, int, int, void *, void *, void *, void *, void *, size_t *size
) {
    return *size = 0;
}
API int cudnnGetBatchNormalizationBackwardExWorkspaceSize(
    void *, int, int, void *, void *, void *, void *, void *, void *, void *, size_t *size
) {
    return *size = 0;
}
API int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void *, int, int, void *, void *, size_t *size) {
    return *size = 0;
}
// Convolutions and attention are graphs, for which there is one engine, which takes them all.
API int cudnnBackendCreateDescriptor(int, void **descriptor) { return describe(descriptor); }
NOTHING(cudnnBackendDestroyDescriptor)
NOTHING(cudnnBackendFinalize)
NOTHING(cudnnBackendSetAttribute)
API int cudnnBackendGetAttribute(void *, int name, int, int64_t wanted, int64_t *count, void *values) {
    enum { HEURISTIC_RESULTS = 202, CONFIG_ENGINE = 300, WORKSPACE_SIZE = 402, ENGINE_INDEX = 1301 };
    bool is_number = name == WORKSPACE_SIZE || name == ENGINE_INDEX;
    if (count) *count = is_number || name == HEURISTIC_RESULTS || name == CONFIG_ENGINE;
    if (is_number && values && wanted) *(int64_t *)values = 0;
    return 0;
}
WORK("cudnn", cudnnBackendExecute, 5000)

static void *fft_stream;
API int cufftCreate(int *plan) { return *plan = 1, 0; }
NOTHING(cufftDestroy)
NOTHING(cufftSetAutoAllocation)
NOTHING(cufftSetWorkArea)
API int cufftSetStream(int, void *stream) { return fft_stream = stream, 0; }
API int cufftXtMakePlanMany(
    int, int, void *, void *, long long, long long, int, void *, long long, long long, int, long long, size_t *size, int
) {
    return *size = 0;
}
API int cufftXtExec(int, void *, void *, int) { return launch(fft_stream, "cufft", "cufftXtExec") ? 6 : 0; }

API int ncclGetUniqueId(void *id) { return memset(id, 1, 128), 0; }
API int ncclCommCuDevice(void *, int *device) { return *device = 0; }
API int ncclCommUserRank(void *, int *rank) { return *rank = 0; }
API int ncclCommCount(void *, int *count) { return *count = 1, 0; }
API int ncclCommGetAsyncError(void *, int *error) { return *error = 0; }
API int ncclCommSplit(void *, int, int, void **communicator, void *) { return describe(communicator); }
DESCRIPTOR(ncclCommInitRank)
DESCRIPTOR(ncclCommInitRankConfig)
DESCRIPTOR(ncclCommInitRankScalable)
NOTHING(ncclCommDestroy)
NOTHING(ncclCommAbort)
NOTHING(ncclCommFinalize)
NOTHING(ncclGroupStart)
NOTHING(ncclGroupEnd)
NOTHING(ncclCommRegister)
NOTHING(ncclCommDeregister)
static int pass_on(const char *name, const void *from, void *to, size_t count, int type, void *stream) {
    static const int bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    if (launch(stream, "nccl", name)) return 1;
    return from == to ? 0 : (memmove(to, from, count * bytes[type]), 0);
}
API int ncclAllReduce(const void *from, void *to, size_t count, int type, int, void *, void *stream) {
    return pass_on("ncclAllReduce", from, to, count, type, stream);
}
API int ncclReduce(const void *from, void *to, size_t count, int type, int, int, void *, void *stream) {
    return pass_on("ncclReduce", from, to, count, type, stream);
}
API int ncclBroadcast(const void *from, void *to, size_t count, int type, int, void *, void *stream) {
    return pass_on("ncclBroadcast", from, to, count, type, stream);
}
API int ncclBcast(void *buffer, size_t count, int type, int, void *, void *stream) {
    return pass_on("ncclBcast", buffer, buffer, count, type, stream);
}
API int ncclAllGather(const void *from, void *to, size_t count, int type, void *, void *stream) {
    return pass_on("ncclAllGather", from, to, count, type, stream);
}
API int ncclReduceScatter(const void *from, void *to, size_t count, int type, int, void *, void *stream) {
    return pass_on("ncclReduceScatter", from, to, count, type, stream);
}

// CUPTI: a record for each kernel, copy and fill while such are asked for.

static bool is_wanted[256];
static CUpti_BuffersCallbackRequestFunc request_buffer;
static CUpti_BuffersCallbackCompleteFunc hand_over;
static CUpti_TimestampCallbackFunc timestamp;
static uint8_t *records;
static size_t room, filled;

static size_t size_of(int kind) {
    size_t size = kind == CUPTI_ACTIVITY_KIND_MEMCPY   ? sizeof(CUpti_ActivityMemcpy6)
                  : kind == CUPTI_ACTIVITY_KIND_MEMSET ? sizeof(CUpti_ActivityMemset4)
                                                       : sizeof(CUpti_ActivityKernel9);
    return (size + 7) / 8 * 8 + 128;  // newer versions of a record have more at its end
}
template <typename Record>
static Record *new_record(CUpti_ActivityKind kind) {
    static uint32_t count = 1 << 30;
    auto *record = (Record *)(records + filled);
    filled += size_of(kind);
    memset(record, 0, size_of(kind));
    record->kind = kind;
    record->start = timestamp ? timestamp() : milliseconds() * 1e6;
    record->end = record->start + 1000;
    record->streamId = 7;
    record->correlationId = ++count;
    return record;
}
API CUptiResult cuptiActivityFlushAll(uint32_t) {
    Lock lock(mutex);
    if (records) hand_over(nullptr, 0, records, room, filled);
    records = nullptr;
    return CUPTI_SUCCESS;
}
static void show_to_profiler(const std::string &kind, const std::string &name) {
    CUpti_ActivityKind number = kind == "copy"   ? CUPTI_ACTIVITY_KIND_MEMCPY
                                : kind == "fill" ? CUPTI_ACTIVITY_KIND_MEMSET
                                                 : CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL;
    if (!is_wanted[number] || !request_buffer) return;
    if (records && filled + size_of(number) > room) cuptiActivityFlushAll(0);
    if (!records) {
        size_t most;
        request_buffer(&records, &room, &most);
        filled = 0;
    }
    if (kind == "copy") {
        auto *record = new_record<CUpti_ActivityMemcpy6>(number);
        record->copyKind = CUPTI_ACTIVITY_MEMCPY_KIND_HTOD;
    } else if (kind == "fill") {
        new_record<CUpti_ActivityMemset4>(number);
    } else {
        auto *record = new_record<CUpti_ActivityKernel9>(number);
        record->name = strdup(name.c_str());
        record->gridX = record->gridY = record->gridZ = record->blockX = record->blockY = record->blockZ = 1;
    }
}
API CUptiResult cuptiActivityGetNextRecord(uint8_t *buffer, size_t size, CUpti_Activity **record) {
    uint8_t *next = *record ? (uint8_t *)*record + size_of((*record)->kind) : buffer;
    if (next >= buffer + size) return CUPTI_ERROR_MAX_LIMIT_REACHED;
    *record = (CUpti_Activity *)next;
    return CUPTI_SUCCESS;
}
API CUptiResult cuptiActivityEnable(CUpti_ActivityKind kind) { return is_wanted[kind] = true, CUPTI_SUCCESS; }
API CUptiResult cuptiActivityDisable(CUpti_ActivityKind kind) { return is_wanted[kind] = false, CUPTI_SUCCESS; }
API CUptiResult cuptiActivityRegisterCallbacks(
    CUpti_BuffersCallbackRequestFunc request, CUpti_BuffersCallbackCompleteFunc complete
) {
    return request_buffer = request, hand_over = complete, CUPTI_SUCCESS;
}
API CUptiResult cuptiActivityRegisterTimestampCallback(CUpti_TimestampCallbackFunc call) {
    return timestamp = call, CUPTI_SUCCESS;
}
API CUptiResult cuptiActivityGetNumDroppedRecords(CUcontext, uint32_t, size_t *count) {
    return *count = 0, CUPTI_SUCCESS;
}
API CUptiResult cuptiGetVersion(uint32_t *version) { return *version = CUPTI_API_VERSION, CUPTI_SUCCESS; }
API CUptiResult cuptiGetResultString(CUptiResult, const char **text) { return *text = NAME, CUPTI_SUCCESS; }
API CUptiResult cuptiSubscribe(CUpti_SubscriberHandle *subscriber, CUpti_CallbackFunc, void *) {
    return *subscriber = (CUpti_SubscriberHandle)8, CUPTI_SUCCESS;
}
API CUptiResult cuptiUnsubscribe(CUpti_SubscriberHandle) { return CUPTI_SUCCESS; }
API CUptiResult cuptiActivitySetAttribute(CUpti_ActivityAttribute, size_t *, void *) { return CUPTI_SUCCESS; }
API CUptiResult cuptiActivityPushExternalCorrelationId(CUpti_ExternalCorrelationKind, uint64_t) { return CUPTI_SUCCESS; }
API CUptiResult cuptiActivityPopExternalCorrelationId(CUpti_ExternalCorrelationKind, uint64_t *) { return CUPTI_SUCCESS; }
API CUptiResult cuptiActivityEnableDriverApi(CUpti_CallbackId, uint8_t) { return CUPTI_SUCCESS; }
API CUptiResult cuptiActivityEnableRuntimeApi(CUpti_CallbackId, uint8_t) { return CUPTI_SUCCESS; }
API CUptiResult cuptiEnableCallback(uint32_t, CUpti_SubscriberHandle, CUpti_CallbackDomain, CUpti_CallbackId) {
    return CUPTI_SUCCESS;
}
API CUptiResult cuptiEnableDomain(uint32_t, CUpti_SubscriberHandle, CUpti_CallbackDomain) { return CUPTI_SUCCESS; }
API CUptiResult cuptiFinalize() { return CUPTI_SUCCESS; }
