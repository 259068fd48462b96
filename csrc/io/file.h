// Positional reads of one file, past the page cache where the file system can.
#pragma once

#include "../base/memory.h"

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace hobbit {

// A byte range of a file.
struct extent {
    uint16_t file   = 0;  // which file of the model
    uint64_t offset = 0;
    uint64_t bytes  = 0;
};

// An open, read-only file. All methods are const and safe to call from several threads at once.
class file {
  public:
    // Throws HOBBIT_ERR_FILE. `direct`: O_DIRECT where it works; a file system without it is read through the page cache.
    file(const std::string & path, bool direct);
    // A file of that size that is not there: for planning. Reads of it fail.
    explicit file(uint64_t size);
    ~file();
    file(const file &)             = delete;
    file & operator=(const file &) = delete;

    const std::string & path() const { return path_; }

    uint64_t size() const { return size_; }

    bool direct() const { return direct_; }

    // Reads start and end at multiples of this; 1 when buffered.
    uint32_t alignment() const { return alignment_; }

    struct range {
        uint64_t begin, bytes;  // aligned
        uint64_t must_have;     // of these from the beginning: the rest may be cut by the end of file
    };

    // What is read to have [offset, offset + bytes).
    range around(uint64_t offset, uint64_t bytes) const {
        const uint64_t begin = align_down(offset, alignment_);
        return { begin, align_up(offset + bytes, alignment_) - begin, offset + bytes - begin };
    }

    // Reads [offset, offset + bytes), both multiples of alignment(), into `dst` (page-aligned). Bytes past the end of file are left
    // as they are, but `must_have` bytes have to exist. Throws HOBBIT_ERR_READ with file, offset and errno; a file that
    // became shorter is a short read, one that became another (see remember) fails too.
    void read(std::byte * dst, uint64_t offset, uint64_t bytes, uint64_t must_have) const;

    // The same for any [offset, offset + bytes): where it lies in `staging`, which grows to what has to be read around it.
    const std::byte * read_any(uint64_t offset, uint64_t bytes, region & staging) const;

    // Learns what this file is known by: its first `bytes` and a few pages of the rest. A file that is overwritten in place would give
    // wrong numbers without an error: so the first read after its size or time of change differ compares these, and fails
    // when they are others. A file that was restored goes on. Not while others read. Throws HOBBIT_ERR_READ.
    void remember(uint64_t bytes);

    // Tells the kernel that what it cached of this file is not needed.
    void drop_page_cache() const;

  private:
    struct stamp {
        uint64_t size    = 0;
        int64_t  seconds = 0;
        int64_t  nanos   = 0;

        bool operator==(const stamp & o) const { return size == o.size && seconds == o.seconds && nanos == o.nanos; }
    };

    stamp stamp_now() const;
    // Compares (or, with `learn`, takes) the hashes, as far as a file of `size` bytes has it.
    bool is_same(uint64_t size, bool learn) const;
    void check_identity() const;
    void read_range(std::byte * dst, uint64_t offset, uint64_t bytes, uint64_t must_have) const;

    std::string path_;
    int         fd_        = -1;
    uint64_t    size_      = 0;
    bool        direct_    = false;
    uint32_t    alignment_ = 1;

    uint64_t                      head_bytes_ = 0;
    mutable std::vector<uint64_t> hashes_;  // a hash per block; empty: nothing to compare with
    mutable std::mutex            stamp_mutex_;
    mutable stamp                 stamp_;  // when the file was last known to be the same
};

}  // namespace hobbit
