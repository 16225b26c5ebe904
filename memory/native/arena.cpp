// An allocator that serves a known sequence of requests at planned addresses inside one slab, and everything else from
// the device's own allocator. No CUDA header: the device's functions come in as pointers (cudaMallocAsync and friends,
// or malloc for tests), so the same source builds and is tested where there is no CUDA.
//
// A planned address is used only if nothing that lives overlaps it. So a plan that does not fit what happens costs
// misses, never memory that two blocks share.
//
// Order is the order of the one stream that the slab belongs to: a block is free for the next request as soon as the
// host freed it. Other streams get fallback memory; a block that another stream used (record_stream) makes the slab's
// stream wait for that stream before its place is used again.

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
constexpr size_t kLookahead = 16;  // planned requests that may be skipped to meet the one that came
constexpr int64_t kFreed = -1;
constexpr unsigned kNoTiming = 2;  // cudaEventDisableTiming

struct Slot {
  int64_t size;    // bytes that are expected, to the byte; below 0: any number, and no place
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
  char* memory = nullptr;  // as the device gave it
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
  static Arena* the_arena = new Arena;  // never destroyed: blocks are freed until the process ends
  return *the_arena;
}

int64_t rounded(int64_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }

bool is_free(const Arena& a, int64_t start, int64_t end) {
  auto after = a.live.lower_bound(start);
  if (after != a.live.end() && after->first < end) return false;
  return after == a.live.begin() || std::prev(after)->second <= start;
}

// The slab's offset for this request, or below 0. Moves on in the plan.
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

// Room for the plan. Where planned blocks still live the slab stays as it is.
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

// What ``waits`` does from now on comes after all that ``waited_for`` was given.
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

// What memory comes from, and how one stream waits for another. All null: host memory.
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

// torch.cuda.memory.CUDAPluggableAllocator calls these two. torch takes a null result for memory, so this throws.
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

// set_record_stream_fn: ``stream`` works on this block as well.
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

// Serve the next requests of ``stream`` from this plan. 1 where there is a slab for it, 0: everything falls back.
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

// Ends the log; returns the number of its integers, and copies them where ``out`` has room for so many.
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

// The peak from now on counts what lives now.
void longhaul_arena_reset_peak() {
  Arena& a = arena();
  std::lock_guard<std::mutex> guard(a.lock);
  a.stats.peak_bytes = a.stats.live_bytes;
}

}  // extern "C"
