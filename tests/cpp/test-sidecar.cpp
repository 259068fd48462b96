// Sidecars: low-precision copies in a file of their own, bound to the model by its fingerprint.
#include "base/error.h"
#include "io/expert-index.h"
#include "io/fingerprint.h"

#include "test.h"
#include "tiny-gguf.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <set>

using namespace hobbit;
using test::tiny_model;
using test::tiny_tensors;

namespace {

tiny_model without_copies() {
    tiny_model m;
    m.low = false;
    return m;
}

hobbit_status refusal(const std::string & path, const std::string & low_path) {
    try {
        expert_index index(path, low_path, false);
        return HOBBIT_OK;
    } catch (const error & e) {
        return e.status();
    }
}

// A folder with model.gguf, which has no low copies, and words for writing and opening sidecars.
class sidecar_story {
  public:
    explicit sidecar_story(const tiny_model & m = without_copies()) : model(m) {
        ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
        model.write(path("model.gguf"));
    }

    std::string path(const std::string & name) const { return folder_.path(name); }

    std::string print(const std::string & name = "model.gguf") const {
        return fingerprint(expert_index(path(name), "", false));
    }

    // Writes a sidecar and opens the model with it; the status, HOBBIT_OK when it was taken.
    hobbit_status open_with(const tiny_tensors & tensors, const std::string & made_for, bool direct = false) const {
        test::write_gguf(path("low.gguf"), tensors, [&](gguf_context * g) {
            gguf_set_val_str(g, "general.architecture", SIDECAR_ARCHITECTURE);
            gguf_set_val_str(g, "hobbit.source", "model.gguf");
            if (!made_for.empty()) {
                gguf_set_val_str(g, FINGERPRINT_KEY, made_for.c_str());
            }
        });
        return open(direct);
    }

    hobbit_status open(bool direct = false) const {
        try {
            const expert_index index(path("model.gguf"), path("low.gguf"), direct);
            CHECK(index.has_low);
            return HOBBIT_OK;
        } catch (const error & e) {
            message = e.what();
            return e.status();
        }
    }

    const tiny_model    model;
    mutable std::string message;

  private:
    test::temp_folder folder_;
};

}  // namespace

TEST("low copies are read from the sidecar, at the places that ggml gives") {
    const sidecar_story s;
    for (const bool direct : { false, true }) {
        CHECK_EQ(s.open_with(s.model.low_copies(), s.print(), direct), HOBBIT_OK);
        const expert_index index(s.path("model.gguf"), s.path("low.gguf"), direct);
        const auto         content = test::read_all(s.path("low.gguf"));
        for (const moe_layer & layer : index.layers()) {
            for (const projection & p : layer.projections) {
                const tensor_source & low = p.source[1];
                CHECK_EQ(low.type, (int32_t) GGML_TYPE_Q4_0);
                CHECK_EQ(index.source(low.file).path(), s.path("low.gguf"));
                const extent x = low.expert(5);
                CHECK_EQ(content[x.offset], test::byte_at(test::seed_of(LOW_PREFIX + p.name), 5 * low.slice));
            }
        }
        CHECK_EQ(index.bytes_dense, expert_index(s.path("model.gguf"), "", direct).bytes_dense);
    }
}

TEST("the order of tensors in a sidecar does not matter") {
    const sidecar_story s;
    tiny_tensors        tensors = s.model.low_copies();
    std::reverse(tensors.begin(), tensors.end());
    CHECK_EQ(s.open_with(tensors, s.print()), HOBBIT_OK);
}

TEST("a sidecar without a fingerprint, or with that of another model, is refused") {
    const sidecar_story s;
    CHECK_EQ(s.open_with(s.model.low_copies(), ""), HOBBIT_ERR_SIDECAR);
    CHECK_EQ(s.open_with(s.model.low_copies(), "sha256:" + std::string(64, '0')), HOBBIT_ERR_SIDECAR);
    CHECK(s.message.find("does not belong") != std::string::npos && s.message.find("(model.gguf)") != std::string::npos);
}

TEST("a sidecar with too few, too many or other tensors is refused") {
    const sidecar_story s;
    tiny_tensors        tensors = s.model.low_copies();
    tensors.pop_back();
    CHECK_EQ(s.open_with(tensors, s.print()), HOBBIT_ERR_SIDECAR);
    CHECK(s.message.find("no low-precision copy of blk.3.ffn_up_exps.weight") != std::string::npos);

    for (const char * name :
         { "hobbit.low.blk.9.ffn_up_exps.weight", "blk.1.ffn_up_exps.weight", "x", "hobbit.low.", "hobbit.low.x" }) {
        tensors = s.model.low_copies();
        tensors.push_back({ name, GGML_TYPE_Q4_0, { 64, 48, 8 } });
        CHECK_EQ(name + std::to_string(s.open_with(tensors, s.print())), name + std::to_string(HOBBIT_ERR_SIDECAR));
    }
    const std::vector<int64_t> shapes[] = { { 64, 64, 8 }, { 32, 48, 8 }, { 64, 48, 7 }, { 64, 48, 16 }, { 64, 48 } };
    for (const auto & ne : shapes) {
        tensors           = s.model.low_copies();
        tensors.back().ne = ne;
        CHECK_EQ(s.open_with(tensors, s.print()), HOBBIT_ERR_SIDECAR);
    }
}

TEST("a model with copies of its own takes no sidecar") {
    const sidecar_story s(tiny_model {});
    CHECK_EQ(s.open_with(s.model.low_copies(), s.print()), HOBBIT_ERR_SIDECAR);
    CHECK(s.message.find("has low-precision copies already") != std::string::npos);
}

TEST("a sidecar in parts is one sidecar; without one of them it is refused") {
    const sidecar_story s;
    const tiny_tensors  all = s.model.low_copies();
    for (uint16_t no = 0; no < 2; ++no) {
        const tiny_tensors mine(all.begin() + no * 4, no == 0 ? all.begin() + 4 : all.end());
        test::write_gguf(s.path(format("low-%05d-of-00002.gguf", no + 1)), mine, [&](gguf_context * g) {
            if (no == 0) {
                gguf_set_val_str(g, "general.architecture", SIDECAR_ARCHITECTURE);
                gguf_set_val_str(g, FINGERPRINT_KEY, s.print().c_str());
            }
            gguf_set_val_u16(g, "split.no", no);
            gguf_set_val_u16(g, "split.count", 2);
        });
    }
    CHECK(expert_index(s.path("model.gguf"), s.path("low-00001-of-00002.gguf"), false).has_low);
    std::filesystem::remove(s.path("low-00002-of-00002.gguf"));
    CHECK_EQ(refusal(s.path("model.gguf"), s.path("low-00001-of-00002.gguf")), HOBBIT_ERR_FILE);
    CHECK_EQ(refusal(s.path("model.gguf"), s.path("low-00002-of-00002.gguf")), HOBBIT_ERR_FILE);
}

TEST("a sidecar cut anywhere or with damaged bytes is read or refused, and nothing worse") {
    const sidecar_story s;
    CHECK_EQ(s.open_with(s.model.low_copies(), s.print()), HOBBIT_OK);
    const test::bytes whole = test::read_all(s.path("low.gguf"));
    for (size_t n = 0; n < whole.size() - PAGE; n += n < 3000 ? 13 : 9973) {
        test::write_all(s.path("low.gguf"), test::bytes(whole.begin(), whole.begin() + (long) n));
        CHECK_EQ(s.open(), HOBBIT_ERR_SIDECAR);
    }
    for (uint32_t i = 0; i < 1000; ++i) {
        test::bytes content = whole;
        content[i * 7919u % 2000] ^= (unsigned char) (1u << i % 8);
        test::write_all(s.path("low.gguf"), content);
        s.open();  // lets through what is not hobbit::error
    }
}

TEST("a sidecar is not a model") {
    const sidecar_story s;
    s.open_with(s.model.low_copies(), s.print());
    CHECK_EQ(refusal(s.path("low.gguf"), ""), HOBBIT_ERR_FORMAT);
}

TEST("a fingerprint does not depend on names of files, metadata, order or parts, nor on direct reads") {
    const sidecar_story s;
    const std::string   print = s.print();
    CHECK_EQ(print.size(), 7u + 64);
    CHECK_EQ(fingerprint(expert_index(s.path("model.gguf"), "", true)), print);
    std::filesystem::rename(s.path("model.gguf"), s.path("renamed.gguf"));
    CHECK_EQ(s.print("renamed.gguf"), print);
    tiny_tensors all = s.model.all();
    std::reverse(all.begin(), all.end());
    const auto meta = [&](gguf_context * g) {
        s.model.meta()(g);
        gguf_set_val_str(g, "tokenizer.chat_template", "x");
    };
    test::write_gguf(s.path("other.gguf"), all, meta);
    CHECK_EQ(s.print("other.gguf"), print);
    for (uint16_t no = 0; no < 2; ++no) {
        const tiny_tensors mine(all.begin() + no * 5, no == 0 ? all.begin() + 5 : all.end());
        test::write_gguf(s.path(format("m-%05d-of-00002.gguf", no + 1)), mine, [&](gguf_context * g) {
            if (no == 0) {
                meta(g);
            }
            gguf_set_val_u16(g, "split.no", no);
            gguf_set_val_u16(g, "split.count", 2);
        });
    }
    CHECK_EQ(s.print("m-00001-of-00002.gguf"), print);
}

TEST("a fingerprint depends on types, shapes, names and weights") {
    const sidecar_story   s;
    const std::string     print = s.print();
    std::set<std::string> prints { print };
    tiny_model            m = s.model;
    m.n_expert              = 9;
    m.write(s.path("experts.gguf"));
    CHECK(prints.insert(s.print("experts.gguf")).second);
    tiny_tensors all = s.model.all();
    all.back().type  = GGML_TYPE_BF16;  // as many bytes
    test::write_gguf(s.path("type.gguf"), all, s.model.meta());
    CHECK(prints.insert(s.print("type.gguf")).second);

    // The first and the last byte of an expert tensor count.
    const expert_index index(s.path("model.gguf"), "", false);
    const auto &       layer = index.layers()[1];
    const auto &       src   = layer.projections[2].source[0];
    const test::bytes  whole = test::read_all(s.path("model.gguf"));
    for (const uint64_t at : { src.offset, src.offset + src.slice * layer.n_expert - 1 }) {
        test::bytes content = whole;
        content[at] ^= 1;
        test::write_all(s.path("changed.gguf"), content);
        CHECK(prints.insert(s.print("changed.gguf")).second);
    }
    // A byte of a dense weight does not: the copies stay what they are.
    gguf_init_params                                        params = { true, nullptr };
    std::unique_ptr<gguf_context, void (*)(gguf_context *)> g(gguf_init_from_file(s.path("model.gguf").c_str(), params),
                                                              gguf_free);
    test::bytes                                             content = whole;
    content[gguf_get_data_offset(g.get()) +
            gguf_get_tensor_offset(g.get(), gguf_find_tensor(g.get(), "token_embd.weight"))] ^= 1;
    test::write_all(s.path("dense.gguf"), content);
    CHECK_EQ(s.print("dense.gguf"), print);
}

TEST_MAIN()
