// ggml/operand.h: the pieces of a product are the whole product, each part of it once, and as large as they are said to be.
#include "ggml/operand.h"

#include "test.h"

#include <algorithm>
#include <vector>

namespace {

const hobbit::repack_kernel EIGHT = { GGML_TYPE_Q4_0, 8, nullptr, nullptr };
const hobbit::tile_kernel   TILES = {};

hobbit::operand operand_of(int64_t n_out, size_t row_bytes, const hobbit::repack_kernel * repacked, bool tiles) {
    hobbit::operand o;
    o.weights       = {};
    o.weights.ne[1] = n_out;
    o.weights.nb[1] = row_bytes;
    o.repacked      = repacked;
    o.tiles         = tiles ? &TILES : nullptr;
    return o;
}

void covers_once(const hobbit::operand & o, int64_t n_rows, int nth) {
    const int64_t     n_out = o.weights.ne[1];
    const hobbit::cut pieces(o, n_rows, nth);
    std::vector<int>  times((size_t) (n_out * n_rows));
    for (int32_t i = 0; i < pieces.n; ++i) {
        const int64_t r0 = i % pieces.n_row_pieces * pieces.rows, c0 = i / pieces.n_row_pieces * pieces.cols;
        CHECK(r0 < n_out && c0 < n_rows);
        for (int64_t r = r0; r < std::min(r0 + pieces.rows, n_out); ++r) {
            for (int64_t c = c0; c < std::min(c0 + pieces.cols, n_rows); ++c) {
                times[(size_t) (r * n_rows + c)]++;
            }
        }
    }
    CHECK(std::all_of(times.begin(), times.end(), [](int n) { return n == 1; }));
    if (o.repacked != nullptr) {
        CHECK(pieces.rows % o.repacked->columns == 0);
    }
}

}  // namespace

TEST("the pieces of a product cover it, each part once") {
    for (int64_t n_out : { 1, 5, 8, 40, 64, 768, 1000 }) {
        for (int64_t n_rows : { 1, 2, 3, 4, 15, 16, 17, 33, 100 }) {
            for (int nth : { 1, 2, 3, 8 }) {
                covers_once(operand_of(n_out, 1152, nullptr, false), n_rows, nth);
                covers_once(operand_of(n_out, 1152, nullptr, true), n_rows, nth);
                if (n_out % 8 == 0) {
                    covers_once(operand_of(n_out, 1152, &EIGHT, false), n_rows, nth);
                    covers_once(operand_of(n_out, 1152, &EIGHT, true), n_rows, nth);
                }
            }
        }
    }
}

TEST("while several batch rows go by, a piece of a repacked slice fits into a core's cache, and every thread has one") {
    for (size_t row_bytes : { 672, 1152, 2304, 8064 }) {
        const hobbit::operand o = operand_of(14336, row_bytes, &EIGHT, false);
        const hobbit::cut     pieces(o, 33, 2);
        CHECK(pieces.cols == 33);
        CHECK((size_t) (pieces.rows - EIGHT.columns) * row_bytes <= 256 << 10);
        CHECK(hobbit::cut(operand_of(64, row_bytes, &EIGHT, false), 33, 8).n == 8);
    }
}

TEST_MAIN()
