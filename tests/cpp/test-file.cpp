// io/file.h: what a file is known by while it is in use.
#include "io/file.h"

#include "base/error.h"
#include "temp-folder.h"
#include "test.h"

#include <cstring>
#include <filesystem>
#include <fstream>
#include <filesystem>
#include <functional>

using namespace hobbit;
using test::bytes;

namespace {

constexpr uint64_t SIZE = (3u << 20) + 123;
constexpr uint64_t HEAD = 5000;

struct opened {
    test::temp_folder folder;
    std::string       path    = folder.path("f");
    bytes             content = test::content(1, SIZE);
    file *            f       = nullptr;

    explicit opened(bool direct) {
        test::write_all(path, content);
        f = new file(path, direct);
        f->remember(HEAD);
    }

    ~opened() { delete f; }

    void read(uint64_t offset = 8192) const {
        region     room(4096, true);
        const auto n = std::min<uint64_t>(4096, SIZE - offset);
        f->read(room.data(), offset, 4096, n);
        CHECK(memcmp(room.data(), content.data() + offset, n) == 0);
    }

    void write(const std::function<void(bytes &)> & change) const {
        bytes other = content;
        change(other);
        test::write_all(path, other, "r+b");
    }

    // The error of a read; empty: none.
    std::string error_of(uint64_t offset = 8192) const {
        try {
            read(offset);
            return "";
        } catch (const error & e) {
            CHECK_EQ(e.status(), HOBBIT_ERR_READ);
            return e.what();
        }
    }
};

bool has(const std::string & text, const std::string & part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST("a file that is overwritten in place fails until it is restored") {
    for (const bool direct : { false, true }) {
        opened o(direct);
        o.read();
        o.write([](bytes & b) { b[100] ^= 1; });  // in the head
        CHECK(has(o.error_of(), "overwritten by another"));
        CHECK(has(o.error_of(), o.path));
        o.write([](bytes &) {});
        o.read();
        o.write([](bytes & b) { b = test::content(2, b.size()); });
        CHECK(has(o.error_of(), "overwritten by another"));
        o.write([](bytes &) {});
        o.read();
    }
}

TEST("another file with the same head is another file") {
    opened o(true);
    o.write([](bytes & b) {
        const bytes head(b.begin(), b.begin() + HEAD);
        b = test::content(2, b.size());
        std::copy(head.begin(), head.end(), b.begin());
    });
    CHECK(has(o.error_of(), "overwritten by another"));
}

TEST("a file that was only touched goes on") {
    opened o(true);
    std::filesystem::last_write_time(o.path, std::filesystem::file_time_type::clock::now());
    o.read();
}

TEST("a truncated file is a short read where it is cut, and read as far as it goes") {
    opened o(true);
    std::filesystem::resize_file(o.path, SIZE / 2);
    o.read();
    CHECK(has(o.error_of(align_down(SIZE, 4096)), "short read"));
    std::filesystem::resize_file(o.path, 0);
    CHECK(has(o.error_of(), "short read"));
    test::write_all(o.path, o.content, "r+b");
    o.read(align_down(SIZE, 4096));
}

TEST("a file that was unlinked or renamed over is read as it was") {
    opened o(true);
    test::write_all(o.folder.path("g"), test::content(3, SIZE));
    std::filesystem::rename(o.folder.path("g"), o.path);
    o.read();
    std::filesystem::remove(o.path);
    o.read();
}

namespace {

uint64_t chars_read() {
    std::ifstream in("/proc/self/io");
    std::string   name;
    uint64_t      n = 0;
    in >> name >> n;
    return n;
}

}  // namespace

TEST("a file that was only touched is looked at once") {
    opened o(true);
    std::filesystem::last_write_time(o.path, std::filesystem::file_time_type::clock::now());
    o.read();
    const uint64_t before = chars_read();
    o.read();
    CHECK(chars_read() - before < 64 << 10);  // to look at it takes a MiB
}

TEST_MAIN()
