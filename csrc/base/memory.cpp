#include "memory.h"

#include "error.h"

#include <sys/mman.h>

#include <cerrno>
#include <utility>

#ifndef MADV_POPULATE_WRITE
#    define MADV_POPULATE_WRITE 23
#endif

namespace hobbit {

static void touch_pages(std::byte * data, size_t size) {
    for (size_t i = 0; i < size; i += PAGE) {
        volatile std::byte & page = *(volatile std::byte *) (data + i);
        page                      = page;
    }
}

// Of what lies whole in [data, data + bytes), in pages of `page` bytes.
static void advise(void * data, size_t bytes, size_t page, int advice) {
    const size_t begin = align_up((size_t) data, page);
    const size_t end   = align_down((size_t) data + bytes, page);
    if (end > begin) {
        madvise((void *) begin, end - begin, advice);
    }
}

void release_pages(void * data, size_t bytes) { advise(data, bytes, PAGE, MADV_DONTNEED); }

void prefer_large_pages(void * data, size_t bytes) { advise(data, bytes, LARGE_PAGE, MADV_HUGEPAGE); }

void prefer_small_pages(void * data, size_t bytes) { advise(data, bytes, PAGE, MADV_NOHUGEPAGE); }

static std::byte * map(size_t size, int flags) {
    if (size == 0) {
        return nullptr;
    }
    void * p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    if (p == MAP_FAILED) {
        fail_os(HOBBIT_ERR_NO_MEMORY, errno, "cannot map " + human_bytes(size));
    }
    // A child made by fork() must not double a pool of gigabytes when the parent writes to it.
    madvise(p, size, MADV_DONTFORK);
    // A direct read into 120 small pages costs more than one into a large one.
    prefer_large_pages(p, size);
    return (std::byte *) p;
}

region::region(size_t bytes, bool fault_in) : data_(map(align_up(bytes, PAGE), 0)), size_(align_up(bytes, PAGE)) {
    if (fault_in) {
        try {
            populate(0, size_);
        } catch (...) {
            munmap(data_, size_);
            throw;
        }
    }
}

region region::reserve(size_t bytes) {
    region r;
    r.size_ = align_up(bytes, PAGE);
    if (r.size_ < LARGE_PAGE) {
        r.data_ = map(r.size_, MAP_NORESERVE);
        return r;
    }
    std::byte * const all = map(r.size_ + LARGE_PAGE, MAP_NORESERVE);
    r.data_               = (std::byte *) align_up((size_t) all, LARGE_PAGE);
    const auto before     = (size_t) (r.data_ - all);
    if (before > 0) {
        munmap(all, before);
    }
    munmap(r.data_ + r.size_, LARGE_PAGE - before);
    return r;
}

void region::populate(size_t offset, size_t bytes) {
    const size_t begin = align_down(offset, PAGE);
    const size_t end   = align_up(offset + bytes, PAGE);
    if (bytes == 0 || madvise(data_ + begin, end - begin, MADV_POPULATE_WRITE) == 0) {
        return;
    }
    const int err = errno;
    if (err != EINVAL && err != ENOSYS) {  // these two: a kernel before 5.14
        fail_os(HOBBIT_ERR_NO_MEMORY, err, "cannot get " + human_bytes(bytes) + " of memory");
    }
    touch_pages(data_ + begin, end - begin);
}

void region::release(size_t offset, size_t bytes) { release_pages(data_ + offset, bytes); }

region::~region() {
    if (data_ != nullptr) {
        munmap(data_, size_);
    }
}

region::region(region && other) noexcept :
    data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

region & region::operator=(region && other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
}

address_range::address_range(size_t bytes) : size_(align_up(bytes, PAGE)) {
    if (size_ == 0) {
        return;
    }
    void * p = mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        fail_os(HOBBIT_ERR_NO_MEMORY, errno, "cannot reserve " + human_bytes(size_) + " of address space");
    }
    data_ = (std::byte *) p;
}

address_range::~address_range() {
    if (data_ != nullptr) {
        munmap(data_, size_);
    }
}

address_range::address_range(address_range && other) noexcept :
    data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

address_range & address_range::operator=(address_range && other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
}

}  // namespace hobbit
