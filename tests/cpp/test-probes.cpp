// Probes of the disk and of the cores.
#include "base/error.h"
#include "ggml/compute-probe.h"
#include "io/read-probe.h"

#include "test.h"
#include "tiny-gguf.h"

#include "ggml.h"

#include <unistd.h>

namespace {

struct model {
    explicit model(bool low) {
        test::tiny_model m;
        m.low = low;
        m.write(path());
    }

    std::string path() const { return folder.path("model.gguf"); }

    test::temp_folder folder;
};

TEST("a probe keeps reading whole slices until its time is over, at any depth") {
    const model                m(true);
    const hobbit::expert_index index(m.path(), "", true);
    for (const uint32_t depth : { 1u, 3u, 16u }) {
        for (const auto p : { hobbit::precision::high, hobbit::precision::low }) {
            const auto r = hobbit::probe_reads(index, p, depth, 0.02);
            CHECK(r.reads >= depth);
            CHECK(r.seconds >= 0.02);
            CHECK(r.bytes >= r.reads * 1024);
            CHECK(r.bytes <= r.reads * index.max_segment);
        }
    }
}

TEST("a model without low copies has none to probe") {
    const model                m(false);
    const hobbit::expert_index index(m.path(), "", true);
    CHECK_THROWS(hobbit::probe_reads(index, hobbit::precision::low, 2, 0.01));
}

TEST("a read that fails ends a probe with its error") {
    const model                m(false);
    const hobbit::expert_index index(m.path(), "", true);
    CHECK_EQ(truncate(m.path().c_str(), 4096), 0);
    CHECK_THROWS(hobbit::probe_reads(index, hobbit::precision::high, 4, 0.5));
}

TEST("products are timed for plain, quantised and repacked types") {
    for (const ggml_type type :
         { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q4_K, GGML_TYPE_IQ2_XXS }) {
        CHECK(hobbit::probe_compute(type, 512, 256, 2, 0.01) > 1e6);
    }
}

TEST("products that cannot be are refused") {
    CHECK_THROWS(hobbit::probe_compute(GGML_TYPE_Q4_K, 100, 64, 1, 0.01));  // no whole blocks
    CHECK_THROWS(hobbit::probe_compute(GGML_TYPE_I32, 256, 64, 1, 0.01));
    CHECK_THROWS(hobbit::probe_compute(-1, 256, 64, 1, 0.01));
    CHECK_THROWS(hobbit::probe_compute(GGML_TYPE_Q8_0, 256, 64, 0, 0.01));
}

}  // namespace

TEST_MAIN()
