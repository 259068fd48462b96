// Page-aligned anonymous memory: the expert pool and the staging buffers live in these.
#pragma once

#include <cstddef>

namespace hobbit {

constexpr size_t PAGE       = 4096;
constexpr size_t LARGE_PAGE = (size_t) 2 << 20;

constexpr size_t align_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

constexpr size_t align_down(size_t n, size_t to) { return n / to * to; }

// An anonymous private mapping, owned. Movable, not copyable.
class region {
  public:
    region() = default;
    // Maps `bytes` (rounded up to pages). With `fault_in` every page is made present now: first touch by a direct read is slow,
    // and a budget that cannot be met must fail here and not in the middle of a token. Throws HOBBIT_ERR_NO_MEMORY.
    region(size_t bytes, bool fault_in);
    // Maps `bytes` that are not counted as used before populate(): room to grow into. Begins with a large page, if it has one.
    static region reserve(size_t bytes);
    // Makes the pages of [offset, offset + bytes) present. Throws HOBBIT_ERR_NO_MEMORY.
    void populate(size_t offset, size_t bytes);
    // Gives back the whole pages inside of [offset, offset + bytes); their contents are lost.
    void release(size_t offset, size_t bytes);
    ~region();
    region(region && other) noexcept;
    region & operator=(region && other) noexcept;
    region(const region &)             = delete;
    region & operator=(const region &) = delete;

    std::byte * data() const { return data_; }

    size_t size() const { return size_; }

  private:
    std::byte * data_ = nullptr;
    size_t      size_ = 0;
};

// Gives the whole pages inside of [data, data + bytes) of anonymous memory back to the system; their contents are lost.
void release_pages(void * data, size_t bytes);

// Asks for large pages for what lies whole in [data, data + bytes) and is not touched yet. Only a wish: the system may have none.
void prefer_large_pages(void * data, size_t bytes);
// The contrary, of all pages that lie in it.
void prefer_small_pages(void * data, size_t bytes);

// Address space without memory behind it: whoever touches it by mistake gets SIGSEGV and not wrong numbers.
class address_range {
  public:
    address_range() = default;
    explicit address_range(size_t bytes);
    ~address_range();
    address_range(address_range && other) noexcept;
    address_range & operator=(address_range && other) noexcept;
    address_range(const address_range &)             = delete;
    address_range & operator=(const address_range &) = delete;

    std::byte * data() const { return data_; }

  private:
    std::byte * data_ = nullptr;
    size_t      size_ = 0;
};

}  // namespace hobbit
