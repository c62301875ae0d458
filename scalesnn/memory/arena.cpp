// A CPU allocator for torch that holds little more than what was ever alive at once.
//
// A training step takes and frees the same tensors every time. A heap that keeps what is freed splits, and
// comes to hold twice what is alive; one that gives it back has every page cleared and mapped again in each
// step. Here blocks of SMALLEST bytes and more lie in one reserved range of addresses, whole pages each.
// Free pages stay resident for the next block. Only where a block needs new pages, and the resident bytes
// would pass the most bytes that were alive at once, and SLACK, as many free bytes elsewhere, those that
// are free for longest, go back to the system. So a heap that splits costs a few pages mapped anew, not
// memory:
//
//     resident = alive + free and resident <= most alive at once · (1 + 1 / SLACK)
//
// Each block lies at the lowest address that has room, one below MIDDLE at the highest: small blocks that
// live long do not stand in the way of large ones. Smaller blocks than SMALLEST, and what finds no room,
// come from the allocator that torch had before.

#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <unordered_map>

namespace {

constexpr size_t SMALLEST = 64 << 10, MIDDLE = 1 << 20, SLACK = 4;
constexpr size_t RANGE = 4;  // reserved addresses, in multiples of the machine's memory: splitting takes some

struct Free {
  size_t bytes;
  bool resident;   // its pages may hold memory
  uint64_t since;  // when it was freed: counts the blocks freed
};

class Arena {
 public:
  Arena(char* begin, size_t bytes, size_t page, size_t memory)
      : begin_(begin), end_(begin + bytes), page_(page), memory_(memory) {
    free_[begin] = {bytes, false, 0};
  }

  bool owns(const void* block) const { return block >= begin_ && block < end_; }

  // A block, or nullptr where there is no room: also where the machine could not hold it, so that torch's own
  // allocator refuses it.
  void* take(size_t bytes) {
    if (bytes > memory_) return nullptr;
    bytes = (bytes + page_ - 1) / page_ * page_;
    std::lock_guard<std::mutex> guard(mutex);
    char* const block = bytes < MIDDLE ? highest(bytes) : lowest(bytes);
    if (!block) return nullptr;
    resident_ += bytes - remove(block, bytes);
    used_[block] = bytes;
    alive_ += bytes;
    most_ = std::max(most_, alive_);
    keep(most_ + most_ / SLACK);
    return block;
  }

  void give(void* block) {
    std::lock_guard<std::mutex> guard(mutex);
    const auto found = used_.find(block);
    alive_ -= found->second;
    add(static_cast<char*>(block), {found->second, true, ++clock_});
    used_.erase(found);
  }

  // Give back all that is free; from here on what is alive now is the most.
  void trim() {
    std::lock_guard<std::mutex> guard(mutex);
    keep(0);
    most_ = alive_;
  }

  std::mutex mutex;

 private:
  using Place = std::map<char*, Free>::iterator;

  // The start of the first run of free pieces, in order of addresses, that has room.
  char* lowest(size_t bytes) const {
    char *start = nullptr, *stop = nullptr;
    for (const auto& [address, piece] : free_) {
      if (address != stop) start = address;
      stop = address + piece.bytes;
      if (stop >= start + bytes) return start;
    }
    return nullptr;
  }

  // The end, less bytes, of the last run that has room.
  char* highest(size_t bytes) const {
    char *start = nullptr, *stop = nullptr;
    for (auto piece = free_.rbegin(); piece != free_.rend(); ++piece) {
      if (piece->first + piece->second.bytes != start) stop = piece->first + piece->second.bytes;
      start = piece->first;
      if (stop >= start + bytes) return stop - bytes;
    }
    return nullptr;
  }

  // Take a stretch out of the free pieces that cover it; returns how many bytes of it are resident.
  size_t remove(char* block, size_t bytes) {
    split(block);
    split(block + bytes);
    size_t resident = 0;
    auto piece = free_.find(block);
    while (piece != free_.end() && piece->first < block + bytes) {
      if (piece->second.resident) resident += piece->second.bytes;
      piece = free_.erase(piece);
    }
    return resident;
  }

  // Make a free piece that reaches over the address two.
  void split(char* address) {
    auto piece = free_.lower_bound(address);
    if (piece == free_.begin()) return;
    --piece;
    const size_t before = address - piece->first;
    if (before >= piece->second.bytes) return;
    Free rest = piece->second;
    rest.bytes -= before;
    piece->second.bytes = before;
    free_[address] = rest;
  }

  // Add a free piece, and join it with its neighbours of the same kind.
  void add(char* address, Free piece) {
    auto next = free_.lower_bound(address);
    if (next != free_.end() && address + piece.bytes == next->first && joins(piece, next->second))
      next = free_.erase(next);
    if (next != free_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second.bytes == address && joins(piece, before->second)) {
        before->second = piece;
        return;
      }
    }
    free_[address] = piece;
  }

  static bool joins(Free& piece, const Free& neighbour) {
    if (piece.resident != neighbour.resident) return false;
    piece.bytes += neighbour.bytes;
    piece.since = std::max(piece.since, neighbour.since);
    return true;
  }

  // Give free pages back to the system until at most this many bytes are resident.
  void keep(size_t most) {
    while (resident_ > most) {
      auto oldest = free_.end();
      for (auto piece = free_.begin(); piece != free_.end(); ++piece)
        if (piece->second.resident && (oldest == free_.end() || piece->second.since < oldest->second.since))
          oldest = piece;
      if (oldest == free_.end()) return;
      drop(oldest, std::min(oldest->second.bytes, (resident_ - most + page_ - 1) / page_ * page_));
    }
  }

  // Give back the last bytes of a free piece.
  void drop(Place piece, size_t bytes) {
    char* const address = piece->first + piece->second.bytes - bytes;
    madvise(address, bytes, MADV_DONTNEED);
    resident_ -= bytes;
    piece->second.bytes -= bytes;
    if (!piece->second.bytes) free_.erase(piece);
    add(address, {bytes, false, 0});
  }

  char *const begin_, *const end_;
  const size_t page_, memory_;
  std::map<char*, Free> free_;  // by address; neighbours differ in whether they are resident
  std::unordered_map<void*, size_t> used_;
  size_t alive_ = 0, most_ = 0, resident_ = 0;
  uint64_t clock_ = 0;
};

Arena* arena = nullptr;  // never destroyed: tensors are freed up to the very end of the process
c10::Allocator* before = nullptr;
c10::DeleterFnPtr free_before = nullptr;

// Frees blocks of both: torch gives those that were taken earlier to the allocator of today, too.
void give(void* block) {
  if (!arena->owns(block)) return free_before(block);
  c10::profiledCPUMemoryReporter().Delete(block);
  arena->give(block);
}

struct ArenaAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* block = bytes < SMALLEST ? nullptr : arena->take(bytes);
    if (block)
      c10::profiledCPUMemoryReporter().New(block, bytes);
    else
      block = before->raw_allocate(bytes);
    return {block, block, &give, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &give; }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

// A child process goes on with the arena as its parent had it.
void lock() { arena->mutex.lock(); }
void unlock() { arena->mutex.unlock(); }

}  // namespace

// Make the arena torch's CPU allocator. 0: there is no range of addresses for it, nothing has changed.
extern "C" int arena_start() {
  if (arena) return 1;
  const size_t page = sysconf(_SC_PAGESIZE), memory = sysconf(_SC_PHYS_PAGES) * page;
  before = c10::GetCPUAllocator();
  free_before = before->raw_deleter();
  if (!free_before) return 0;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* const range = mmap(nullptr, RANGE * memory, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (range == MAP_FAILED) return 0;
  arena = new Arena(static_cast<char*>(range), RANGE * memory, page, memory);
  pthread_atfork(&lock, &unlock, &unlock);
  static ArenaAllocator allocator;
  c10::SetCPUAllocator(&allocator, 1);
  return 1;
}

extern "C" void arena_trim() { arena->trim(); }
