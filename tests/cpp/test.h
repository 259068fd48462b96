// A test program in one header: TEST("a claim") { ... CHECK(x); CHECK_EQ(a, b); CHECK_THROWS(f()); } and TEST_MAIN().
// `program [text]` runs the tests whose name contains text. A failed check ends its test, not the program.
#pragma once

#include <cstdio>
#include <cstring>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace test {

struct failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct test_case {
    const char * name;
    void (*run)();
};

inline std::vector<test_case> & all() {
    static std::vector<test_case> cases;
    return cases;
}

struct registration {
    registration(const char * name, void (*run)()) { all().push_back({ name, run }); }
};

[[noreturn]] inline void fail(const char * file, int line, const std::string & text) {
    throw failure(std::string(file) + ":" + std::to_string(line) + ": " + text);
}

template <typename A, typename B>
void check_eq(const A & a, const B & b, const char * text, const char * file, int line) {
    if (!(a == b)) {
        std::ostringstream out;
        out << text << " (" << a << " and " << b << ")";
        fail(file, line, out.str());
    }
}

inline int run(int argc, char ** argv) {
    int n_failed = 0;
    int n_run    = 0;
    for (const test_case & t : all()) {
        if (argc > 1 && !std::strstr(t.name, argv[1])) {
            continue;
        }
        n_run++;
        try {
            t.run();
            std::printf("ok      %s\n", t.name);
        } catch (const std::exception & e) {
            n_failed++;
            std::printf("FAILED  %s\n        %s\n", t.name, e.what());
        }
        std::fflush(stdout);
    }
    std::printf("%d of %d tests failed\n", n_failed, n_run);
    return n_failed > 0 || n_run == 0;
}

}  // namespace test

#define TEST_JOIN_(a, b) a##b
#define TEST_JOIN(a, b)  TEST_JOIN_(a, b)
#define TEST(claim)                                                                                  \
    static void               TEST_JOIN(test_, __LINE__)();                                          \
    static test::registration TEST_JOIN(registration_, __LINE__)(claim, TEST_JOIN(test_, __LINE__)); \
    static void               TEST_JOIN(test_, __LINE__)()

#define CHECK(x)                                             \
    do {                                                     \
        if (!(x)) {                                          \
            test::fail(__FILE__, __LINE__, "not true: " #x); \
        }                                                    \
    } while (0)
#define CHECK_EQ(a, b) test::check_eq((a), (b), "not equal: " #a ", " #b, __FILE__, __LINE__)
#define CHECK_THROWS(...)                                                   \
    do {                                                                    \
        bool thrown = false;                                                \
        try {                                                               \
            __VA_ARGS__;                                                    \
        } catch (const std::exception &) {                                  \
            thrown = true;                                                  \
        }                                                                   \
        if (!thrown) {                                                      \
            test::fail(__FILE__, __LINE__, "did not throw: " #__VA_ARGS__); \
        }                                                                   \
    } while (0)
#define TEST_MAIN() \
    int main(int argc, char ** argv) { return test::run(argc, argv); }
