#include "file.h"

#include "../base/error.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>

namespace hobbit {

// The offset alignment that direct reads of this file need; 0 where it has none (ext4 takes O_DIRECT even so, and reads through the page
// cache).
static uint32_t direct_alignment(int fd) {
#ifdef STATX_DIOALIGN
    struct statx sx = {};
    if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &sx) == 0 && (sx.stx_mask & STATX_DIOALIGN) != 0) {
        return sx.stx_dio_offset_align;
    }
#else
    (void) fd;
#endif
    return PAGE;  // serves every disk that does not say what it needs
}

file::file(const std::string & path, bool direct) : path_(path) {
    // Looked at before it is opened: opening a FIFO would wait for a writer.
    struct stat st = {};
    if (stat(path.c_str(), &st) != 0) {
        fail_os(HOBBIT_ERR_FILE, errno, "cannot open " + path);
    }
    if (!S_ISREG(st.st_mode)) {
        fail_os(HOBBIT_ERR_FILE, S_ISDIR(st.st_mode) ? EISDIR : EINVAL, "not a regular file: " + path);
    }
    const region probe(direct ? PAGE : 0, true);
    if (direct) {
        fd_     = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
        direct_ = fd_ >= 0;
    }
    if (fd_ < 0) {
        fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    }
    if (fd_ < 0 || fstat(fd_, &st) != 0) {
        const int err = errno;
        if (fd_ >= 0) {
            close(fd_);
        }
        fail_os(HOBBIT_ERR_FILE, err, "cannot open " + path);
    }
    size_ = (uint64_t) st.st_size;
    if (direct_) {
        alignment_ = direct_alignment(fd_);
        // Some file systems open with O_DIRECT and refuse the first read: find out now.
        if (alignment_ == 0 || (size_ >= PAGE && pread(fd_, probe.data(), PAGE, 0) < 0 && errno == EINVAL)) {
            close(fd_);
            direct_    = false;
            alignment_ = 1;
            fd_        = open(path.c_str(), O_RDONLY | O_CLOEXEC);
            if (fd_ < 0) {
                fail_os(HOBBIT_ERR_FILE, errno, "cannot open " + path);
            }
        }
    }
    if (!direct_) {
        // Slices are read at random: read-ahead would fetch the neighbours' bytes and charge them to the memory cgroup.
        posix_fadvise(fd_, 0, 0, POSIX_FADV_RANDOM);
    }
}

file::file(uint64_t size) : path_("(no file)"), size_(size) {}

file::~file() {
    if (fd_ >= 0) {
        close(fd_);
    }
}

void file::read(std::byte * dst, uint64_t offset, uint64_t bytes, uint64_t must_have) const {
    read_range(dst, offset, bytes, must_have);
    if (!hashes_.empty()) {
        check_identity();
    }
}

const std::byte * file::read_any(uint64_t offset, uint64_t bytes, region & staging) const {
    const range r = around(offset, bytes);
    if (staging.size() < r.bytes) {
        staging = region(r.bytes, false);
    }
    read(staging.data(), r.begin, r.bytes, r.must_have);
    return staging.data() + (offset - r.begin);
}

void file::read_range(std::byte * dst, uint64_t offset, uint64_t bytes, uint64_t must_have) const {
    uint64_t done = 0;
    while (done < bytes) {
        const ssize_t n = pread(fd_, dst + done, bytes - done, (off_t) (offset + done));
        if (n < 0) {
            if (errno == EINTR) {
                continue;
            }
            fail_os(HOBBIT_ERR_READ, errno,
                    format("read of %" PRIu64 " bytes at offset %" PRIu64 " of %s failed", bytes - done, offset + done,
                           path_.c_str()));
        }
        done += (uint64_t) n;
        // The end of file may stand in the middle of the last aligned block.
        if (n == 0 || (done >= must_have && done < bytes && offset + done >= size_)) {
            break;
        }
        if (direct_ && done < bytes && done % alignment_ != 0) {
            break;  // a direct read stops in mid-block only at the end of file
        }
    }
    if (done < must_have) {
        fail(HOBBIT_ERR_READ, format("short read: %" PRIu64 " of %" PRIu64 " bytes at offset %" PRIu64
                                     " of %s; was the file truncated or replaced while it was in use?",
                                     done, must_have, offset, path_.c_str()));
    }
    if (!direct_) {
        posix_fadvise(fd_, (off_t) offset, (off_t) bytes, POSIX_FADV_DONTNEED);
    }
}

file::stamp file::stamp_now() const {
    struct stat st = {};
    if (fstat(fd_, &st) != 0) {
        fail_os(HOBBIT_ERR_READ, errno, "cannot look at " + path_);
    }
    return { (uint64_t) st.st_size, (int64_t) st.st_mtim.tv_sec, (int64_t) st.st_mtim.tv_nsec };
}

// FNV-1a.
static uint64_t hash_of(const std::byte * data, uint64_t n) {
    uint64_t hash = 14695981039346656037ull;
    for (uint64_t i = 0; i < n; ++i) {
        hash = (hash ^ (uint64_t) data[i]) * 1099511628211ull;
    }
    return hash;
}

// What a file is known by: blocks of the head, and pages spread over the rest, since models of one architecture may have the same head.
static constexpr uint64_t BLOCK    = 1u << 20;
static constexpr uint64_t N_SAMPLE = 16;

bool file::is_same(uint64_t size, bool learn) const {
    const uint64_t page = align_up(PAGE, alignment_);
    const region   staging(BLOCK, false);
    const uint64_t n_head = align_up(head_bytes_, BLOCK) / BLOCK;
    for (uint64_t i = 0; i < n_head + N_SAMPLE; ++i) {
        const bool     head = i < n_head;
        const uint64_t at   = head ? i * BLOCK : align_down(size_ / (N_SAMPLE + 1) * (i - n_head + 1), page);
        const uint64_t n    = head ? std::min(BLOCK, head_bytes_ - at) : std::min(page, size_ - at);
        if (at + n > size) {
            continue;  // cut off: whoever reads there is told
        }
        read_range(staging.data(), at, around(at, n).bytes, n);
        const uint64_t hash = hash_of(staging.data(), n);
        if (learn) {
            hashes_[i] = hash;
        } else if (hash != hashes_[i]) {
            return false;
        }
    }
    return true;
}

void file::remember(uint64_t bytes) {
    stamp_      = stamp_now();
    head_bytes_ = std::min(bytes, size_);
    hashes_.assign(align_up(head_bytes_, BLOCK) / BLOCK + N_SAMPLE, 0);
    is_same(size_, true);
}

void file::check_identity() const {
    const stamp                 now = stamp_now();
    std::lock_guard<std::mutex> lock(stamp_mutex_);
    if (now == stamp_) {
        return;
    }
    if (!is_same(now.size, false)) {
        fail(HOBBIT_ERR_READ, path_ + " was overwritten by another file while it was in use: load the model again");
    }
    stamp_ = now;
}

void file::drop_page_cache() const { posix_fadvise(fd_, 0, 0, POSIX_FADV_DONTNEED); }

}  // namespace hobbit
