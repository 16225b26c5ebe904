// An allocator that serves a known sequence of requests at planned addresses inside one slab, and everything else from
// the device's own allocator. It needs no CUDA header, because the device's functions are passed as pointers
// (cudaMallocAsync and others, or malloc for tests), so the same source can be built and tested without CUDA.
//
// A planned address is used only if no live block overlaps it. So a plan that does not fit the requests causes misses,
// but two blocks never share memory.
//
// The slab belongs to one stream: a block can be reused as soon as the host has freed it, because later work of that
// stream runs later. Other streams get fallback memory. If another stream used a block (record_stream), the slab's
// stream waits for it before the block's place is reused.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using DeviceMalloc = int (*)(void**, size_t, void*);
using DeviceFree = int (*)(void*, void*);
using EventCreate = int (*)(void** event, unsigned flags);
using EventRecord = int (*)(void* event, void* stream);
using StreamWait = int (*)(void* stream, void* event, unsigned flags);
using EventDestroy = int (*)(void* event);

constexpr int64_t kAlignment = 512;
constexpr size_t kLookahead = 16;  // planned requests that may be skipped to find the actual one
constexpr int64_t kFreed = -1;
constexpr unsigned kNoTiming = 2;  // cudaEventDisableTiming

struct Slot {
  int64_t size;    // exact number of bytes expected; below 0: any number, and no address
  int64_t offset;  // in the slab; below 0: not planned, such as blocks that outlive the unit
};

struct Block {
  int64_t size;
  int64_t offset;  // in the slab; below 0: fallback
  void* stream;
  std::vector<void*> used_by;
};

struct Stats {
  int64_t hits, misses, refused, unplanned, outside, live_bytes, peak_bytes, slab_bytes, failures;
};

struct Arena {
  std::mutex lock;
  DeviceMalloc device_malloc = nullptr;
  DeviceFree device_free = nullptr;
  EventCreate event_create = nullptr;
  EventRecord event_record = nullptr;
  StreamWait stream_wait = nullptr;
  EventDestroy event_destroy = nullptr;
  char* memory = nullptr;  // as the device returned it
  char* slab = nullptr;    // aligned
  int64_t slab_bytes = 0;
  void* slab_stream = nullptr;
  std::vector<Slot> plan;
  size_t next = 0;
  bool serving = false;
  std::map<int64_t, int64_t> live;  // planned blocks: start to end
  std::unordered_map<void*, Block> blocks;
  bool logging = false;
  int64_t num_logged = 0;
  std::unordered_map<void*, int64_t> names;  // of logged blocks
  std::vector<int64_t> log;                  // pairs (block, bytes or kFreed)
  Stats stats{};
};

Arena& arena() {
  static Arena* the_arena = new Arena;  // never destroyed, because blocks are freed until the process ends
  return *the_arena;
}

int64_t rounded(int64_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }

bool is_free(const Arena& a, int64_t start, int64_t end) {
  auto after = a.live.lower_bound(start);
  if (after != a.live.end() && after->first < end) return false;
  return after == a.live.begin() || std::prev(after)->second <= start;
}

// The slab's offset for this request, or below 0. Advances in the plan.
int64_t planned_offset(Arena& a, int64_t size, void* stream) {
  if (!a.serving) {
    ++a.stats.outside;
    return -1;
  }
  size_t found = a.next;
  const size_t last = std::min(a.plan.size(), a.next + kLookahead);
  const bool any_size = found < last && a.plan[found].size < 0;
  while (!any_size && found < last && a.plan[found].size != size) ++found;
  if (found >= last || stream != a.slab_stream) {
    ++a.stats.misses;
    return -1;
  }
  a.next = found + 1;
  const int64_t offset = a.plan[found].offset;
  if (offset < 0 || any_size) {
    ++a.stats.unplanned;
    return -1;
  }
  const int64_t end = offset + rounded(size);
  if (end > a.slab_bytes || !is_free(a, offset, end)) {
    ++a.stats.refused;
    return -1;
  }
  ++a.stats.hits;
  return offset;
}

void* fallback(Arena& a, int64_t size, void* stream) {
  void* pointer = nullptr;
  if (a.device_malloc == nullptr || a.device_malloc(&pointer, static_cast<size_t>(size), stream) != 0) return nullptr;
  return pointer;
}

void note(Arena& a, void* pointer, int64_t size) {
  if (!a.logging) return;
  a.names[pointer] = a.num_logged;
  a.log.push_back(a.num_logged++);
  a.log.push_back(size);
}

void free_slab(Arena& a) {
  if (a.memory != nullptr) a.device_free(a.memory, a.slab_stream);
  a.memory = a.slab = nullptr;
  a.slab_bytes = 0;
}

// Make the slab large enough for the plan. While planned blocks are live, the slab cannot be replaced.
bool ensure_slab(Arena& a, int64_t num_bytes, void* stream) {
  if (a.slab_bytes >= num_bytes && a.slab_stream == stream && a.slab != nullptr) return true;
  if (!a.live.empty()) return false;
  free_slab(a);
  a.memory = static_cast<char*>(fallback(a, num_bytes + kAlignment, stream));
  if (a.memory == nullptr) return false;
  const auto address = reinterpret_cast<uintptr_t>(a.memory);
  a.slab = a.memory + (kAlignment - address % kAlignment) % kAlignment;
  a.slab_bytes = num_bytes;
  a.slab_stream = stream;
  return true;
}

// Make later work of stream ``waits`` run after everything queued on stream ``waited_for`` so far.
void join(const Arena& a, void* waits, void* waited_for) {
  void* event = nullptr;
  if (a.event_create == nullptr || a.event_create(&event, kNoTiming) != 0) return;
  a.event_record(event, waited_for);
  a.stream_wait(waits, event, 0);
  a.event_destroy(event);
}

int host_malloc(void** pointer, size_t size, void*) {
  return posix_memalign(pointer, kAlignment, size == 0 ? 1 : size);
}

int host_free(void* pointer, void*) {
  std::free(pointer);
  return 0;
}

}  // namespace

extern "C" {

// Set the functions that provide memory and make one stream wait for another. All null: host memory.
void longhaul_arena_device(void* device_malloc, void* device_free, void* event_create, void* event_record,
                           void* stream_wait, void* event_destroy) {
  Arena& a = arena();
  std::lock_guard<std::mutex> guard(a.lock);
  a.device_malloc = device_malloc ? reinterpret_cast<DeviceMalloc>(device_malloc) : host_malloc;
  a.device_free = device_free ? reinterpret_cast<DeviceFree>(device_free) : host_free;
  a.event_create = reinterpret_cast<EventCreate>(event_create);
  a.event_record = reinterpret_cast<EventRecord>(event_record);
  a.stream_wait = reinterpret_cast<StreamWait>(stream_wait);
  a.event_destroy = reinterpret_cast<EventDestroy>(event_destroy);
}

// torch.cuda.memory.CUDAPluggableAllocator calls these two. torch would use a null result as memory, so this throws.
void* longhaul_arena_malloc(ptrdiff_t size, int, void* stream) {
  if (size <= 0) return nullptr;
  Arena& a = arena();
  std::lock_guard<std::mutex> guard(a.lock);
  const int64_t offset = planned_offset(a, size, stream);
  void* pointer = offset >= 0 ? a.slab + offset : fallback(a, size, stream);
  if (pointer == nullptr) {
    ++a.stats.failures;
    throw std::runtime_error("out of device memory: " + std::to_string(size) + " bytes asked for, " +
                             std::to_string(a.stats.live_bytes) + " bytes in use beside a slab of " +
                             std::to_string(a.slab_bytes));
  }
  if (offset >= 0) a.live[offset] = offset + rounded(size);
  a.blocks[pointer] = Block{size, offset, stream, {}};
  a.stats.live_bytes += rounded(size);
  a.stats.peak_bytes = std::max(a.stats.peak_bytes, a.stats.live_bytes);
  note(a, pointer, size);
  return pointer;
}

void longhaul_arena_free(void* pointer, size_t, int, void*) {
  if (pointer == nullptr) return;
  Arena& a = arena();
  std::lock_guard<std::mutex> guard(a.lock);
  auto found = a.blocks.find(pointer);
  if (found == a.blocks.end()) return;
  Block block = std::move(found->second);
  a.blocks.erase(found);
  for (void* other : block.used_by) join(a, block.stream, other);
  if (block.offset >= 0) {
    a.live.erase(block.offset);
  } else {
    a.device_free(pointer, block.stream);
  }
  a.stats.live_bytes -= rounded(block.size);
  auto name = a.names.find(pointer);
  if (name != a.names.end()) {
    if (a.logging) {
      a.log.push_back(name->second);
      a.log.push_back(kFreed);
    }
    a.names.erase(name);
  }
}

// For set_record_stream_fn: ``stream`` uses this block too.
void longhaul_arena_record_stream(void* pointer, void* stream) {
  Arena& a = arena();
  std::lock_guard<std::mutex> guard(a.lock);
  auto found = a.blocks.find(pointer);
  if (found == a.blocks.end() || found->second.stream == stream) return;
  for (void* other : found->second.used_by) {
    if (other == stream) return;
  }
  found->second.used_by.push_back(stream);
}

// Serve the next requests of ``stream`` from this plan. Returns 1, or 0 if there is no slab and all use the fallback.
int longhaul_arena_begin(const int64_t* sizes, const int64_t* offsets, int64_t count, int64_t slab_bytes, void* stream) {
  Arena& a = arena();
  std::lock_guard<std::mutex> guard(a.lock);
  a.plan.clear();
  a.next = 0;
  a.serving = ensure_slab(a, slab_bytes, stream);
  if (!a.serving) return 0;
  for (int64_t i = 0; i < count; ++i) a.plan.push_back(Slot{sizes[i], offsets[i]});
  return 1;
}

void longhaul_arena_end() {
  Arena& a = arena();
  std::lock_guard<std::mutex> guard(a.lock);
  a.serving = false;
}

void longhaul_arena_begin_log() {
  Arena& a = arena();
  std::lock_guard<std::mutex> guard(a.lock);
  a.logging = true;
  a.num_logged = 0;
  a.names.clear();
  a.log.clear();
}

// End the log; returns the number of its integers, and copies them if ``out`` has enough room.
int64_t longhaul_arena_end_log(int64_t* out, int64_t room) {
  Arena& a = arena();
  std::lock_guard<std::mutex> guard(a.lock);
  a.logging = false;
  a.names.clear();
  const auto count = static_cast<int64_t>(a.log.size());
  if (out != nullptr && room >= count) {
    for (int64_t i = 0; i < count; ++i) out[i] = a.log[i];
  }
  return count;
}

// hits, misses, refused, unplanned, outside, live, peak, slab, failures
void longhaul_arena_stats(int64_t* out) {
  Arena& a = arena();
  std::lock_guard<std::mutex> guard(a.lock);
  a.stats.slab_bytes = a.slab_bytes;
  const Stats& s = a.stats;
  const int64_t values[] = {s.hits, s.misses, s.refused, s.unplanned, s.outside,
                            s.live_bytes, s.peak_bytes, s.slab_bytes, s.failures};
  for (size_t i = 0; i < sizeof(values) / sizeof(values[0]); ++i) out[i] = values[i];
}

// Start a new peak at the bytes that are live now.
void longhaul_arena_reset_peak() {
  Arena& a = arena();
  std::lock_guard<std::mutex> guard(a.lock);
  a.stats.peak_bytes = a.stats.live_bytes;
}

}  // extern "C"
