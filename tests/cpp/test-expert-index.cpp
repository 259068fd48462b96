// io/expert-index.h on small GGUFs: what is found in good ones, and how bad ones are refused.
#include "io/expert-index.h"

#include "base/error.h"

#include "test.h"
#include "tiny-gguf.h"

#include <cerrno>
#include <random>
#include <regex>
#include <set>

using namespace hobbit;
using test::tiny_model;
using test::tiny_tensors;

namespace {

// A folder with one model in it, and words for opening it.
class model_story {
  public:
    model_story() {
        ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    }

    explicit model_story(const tiny_model & m) : model_story() { m.write(path()); }

    model_story(const tiny_tensors & tensors, const test::metadata & meta) : model_story() {
        test::write_gguf(path(), tensors, meta);
    }

    std::string path(const std::string & name = "model.gguf") const { return folder_.path(name); }

    expert_index open(const std::string & low_path = "") const { return expert_index(path(), low_path, false); }

    // The status that opening fails with, HOBBIT_OK when it does not; anything but hobbit::error is let through.
    hobbit_status refusal(const std::string & low_path = "") const { return refusal_of(path(), low_path); }

    static hobbit_status refusal_of(const std::string & path, const std::string & low_path = "") {
        try {
            expert_index index(path, low_path, false);
            return HOBBIT_OK;
        } catch (const error & e) {
            return strlen(e.what()) > 0 ? e.status() : HOBBIT_ERR_INTERNAL;
        }
    }

  private:
    test::temp_folder folder_;
};

// Where ggml itself says that a tensor's data is.
uint64_t offset_by_ggml(const std::string & path, const std::string & tensor) {
    gguf_init_params                                        params = { true, nullptr };
    std::unique_ptr<gguf_context, void (*)(gguf_context *)> g(gguf_init_from_file(path.c_str(), params), gguf_free);
    return gguf_get_data_offset(g.get()) + gguf_get_tensor_offset(g.get(), gguf_find_tensor(g.get(), tensor.c_str()));
}

tiny_tensors with(tiny_tensors tensors, const test::tiny_tensor & more) {
    tensors.push_back(more);
    return tensors;
}

// Splits a model's tensors over `n` files called model-0000x-of-0000n.gguf.
void write_split(const model_story & s, const tiny_model & m, uint16_t n) {
    const tiny_tensors all = m.all();
    for (uint16_t no = 0; no < n; ++no) {
        const tiny_tensors mine(all.begin() + (long) (all.size() * no / n),
                                all.begin() + (long) (all.size() * (no + 1) / n));
        test::write_gguf(s.path(format("model-%05u-of-%05u.gguf", no + 1u, (unsigned) n)), mine, [&](gguf_context * g) {
            if (no == 0) {
                m.meta()(g);
            }
            gguf_set_val_u16(g, "split.no", no);
            gguf_set_val_u16(g, "split.count", n);
            gguf_set_val_i32(g, "split.tensors.count", (int32_t) all.size());
        });
    }
}

}  // namespace

TEST("expert tensors are found with their shapes and types, in the order of their use") {
    const model_story  s(tiny_model {});
    const expert_index index = s.open();
    CHECK_EQ(index.n_block, 4u);
    CHECK_EQ(index.n_expert, 8u);
    CHECK_EQ(index.n_expert_used, 2u);
    CHECK_EQ(index.layers().size(), 3u);
    for (uint32_t l = 0; l < 3; ++l) {
        const moe_layer & layer = index.layers()[l];
        CHECK_EQ(layer.block, l + 1);
        CHECK_EQ(layer.n_expert, 8u);
        CHECK_EQ(layer.projections.size(), 3u);
        for (const projection & p : layer.projections) {
            CHECK_EQ(p.source[0].type, (int32_t) GGML_TYPE_F16);
            CHECK_EQ(p.source[1].type, (int32_t) GGML_TYPE_Q4_0);
            CHECK_EQ(p.n_in, 64);
            CHECK_EQ(p.n_out, p.is_down ? 64 : 48);
        }
        CHECK_EQ(layer.projections[0].name, format("blk.%u.ffn_gate_exps.weight", l + 1));
        CHECK_EQ(layer.projections[1].name, format("blk.%u.ffn_up_exps.weight", l + 1));
        CHECK_EQ(layer.projections[2].name, format("blk.%u.ffn_down_exps.weight", l + 1));
        CHECK(layer.projections[2].is_down);  // last, though it stands first in the file
    }
}

TEST("offsets are those of ggml, slices are the experts one after another") {
    const model_story  s(tiny_model {});
    const expert_index index   = s.open();
    const test::bytes  content = test::read_all(s.path());
    for (const moe_layer & layer : index.layers()) {
        for (const projection & p : layer.projections) {
            for (const int i : { 0, 1 }) {
                const std::string     name = (i == 1 ? LOW_PREFIX : "") + p.name;
                const tensor_source & src  = p.source[i];
                CHECK_EQ(src.offset, offset_by_ggml(s.path(), name));
                CHECK_EQ(src.row_bytes, ggml_row_size((ggml_type) src.type, p.n_in));
                CHECK_EQ(src.slice, src.row_bytes * (uint64_t) p.n_out);
                for (const uint32_t e : { 0u, 5u, 7u }) {
                    const extent x = src.expert(e);
                    CHECK_EQ(x.offset, src.offset + e * src.slice);
                    CHECK_EQ(x.bytes, src.slice);
                    for (uint64_t b = 0; b < x.bytes; b += 101) {
                        CHECK_EQ(content[x.offset + b], test::byte_at(test::seed_of(name), e * src.slice + b));
                    }
                }
            }
        }
    }
}

TEST("slots have room for the aligned range around any slice") {
    const model_story s(tiny_model {});
    for (const bool direct : { false, true }) {
        const expert_index index(s.path(), "", direct);
        for (const moe_layer & layer : index.layers()) {
            for (const int i : { 0, 1 }) {
                uint64_t at = 0;
                for (const projection & p : layer.projections) {
                    CHECK_EQ(p.slot_offset[i], at);
                    CHECK_EQ(at % PAGE, 0u);
                    at += p.slot_bytes[i];
                    for (uint32_t e = 0; e < layer.n_expert; ++e) {
                        const extent x = p.source[i].expert(e);
                        const file & f = index.source(x.file);
                        CHECK(f.around(x.offset, x.bytes).bytes <= p.slot_bytes[i]);
                    }
                    CHECK(p.slot_bytes[i] <= index.max_segment);
                }
                CHECK_EQ(layer.slot_bytes((precision) i), at);
                CHECK(at <= index.max_slot[i]);
            }
        }
    }
}

TEST("bytes are counted: dense, high, low") {
    const model_story  s(tiny_model {});
    const expert_index index = s.open();
    // F16: gate, up 64 x 48 x 2 = 6144, down 64 x 64 x 2 = 8192. Q4_0, 36 bytes for 64: 48 x 36 = 1728, 64 x 36 = 2304.
    CHECK_EQ(index.max_expert[0], 6144u + 6144u + 8192u);
    CHECK_EQ(index.max_expert[1], 1728u + 1728u + 2304u);
    CHECK_EQ(index.bytes_total[0], 3u * 8 * 20480);
    CHECK_EQ(index.bytes_total[1], 3u * 8 * 5760);
    // token_embd 64 x 10 x 4, the dense block 64 x 33 x 2, three routers 64 x 8 x 4
    CHECK_EQ(index.bytes_dense, 2560u + 4224u + 3u * 2048);
}

TEST("tensors are found by name, and the pattern matches them and nothing else") {
    const tiny_model   m;
    const model_story  s(m);
    const expert_index index = s.open();
    const std::regex   pattern(index.tensor_pattern());
    CHECK(index.find("blk.2.ffn_down_exps.weight") == std::make_pair(1, 2));
    for (const auto & t : m.all()) {
        const bool is_low = t.name.find(LOW_PREFIX) == 0, is_expert = !is_low && t.ne.size() == 3;
        CHECK_EQ(index.find(t.name).first >= 0, is_expert);
        CHECK_EQ(std::regex_search(t.name, pattern), is_expert);
    }
}

TEST("token embeddings may stay on disk where the output is a matrix of its own") {
    const tiny_model m;
    CHECK(model_story(m).open().embeddings().name.empty());

    const model_story       s(with(m.all(), { "output.weight", GGML_TYPE_F32, { m.n_in, 10 } }), m.meta());
    const expert_index      index = s.open();
    const embedding_table & table = index.embeddings();
    CHECK_EQ(table.name, "token_embd.weight");
    CHECK_EQ(table.n_in, (int64_t) m.n_in);
    CHECK_EQ(table.n_rows, (int64_t) 10);
    CHECK_EQ(table.source.row_bytes, (uint64_t) m.n_in * 4);
    CHECK_EQ(table.source.offset, offset_by_ggml(s.path(), "token_embd.weight"));
    CHECK_EQ(table.source.expert(3).offset, table.source.offset + 3 * table.source.row_bytes);
}

TEST("a model without low copies has none, one with some of them neither") {
    tiny_model m;
    m.low = false;
    CHECK(!model_story(m).open().has_low);
    CHECK(model_story(tiny_model {}).open().has_low);
    CHECK(!model_story(with(m.all(), m.low_copies()[0]), m.meta()).open().has_low);
}

TEST("a fused gate_up comes before down, two expert sets in a block are two layers") {
    const tiny_tensors fused = { { "blk.0.ffn_down_exps.weight", GGML_TYPE_F32, { 4, 8, 2 } },
                                 { "blk.0.ffn_gate_up_exps.weight", GGML_TYPE_F32, { 8, 8, 2 } },
                                 { "blk.0.ffn_down_chexps.weight", GGML_TYPE_F32, { 4, 8, 3 } },
                                 { "blk.0.ffn_up_chexps.weight", GGML_TYPE_F32, { 8, 4, 3 } } };
    const model_story  s(fused, tiny_model {}.meta());
    const expert_index index = s.open();
    CHECK_EQ(index.layers().size(), 2u);
    CHECK_EQ(index.n_expert, 3u);
    CHECK(!index.layers()[0].chunked() && index.layers()[1].chunked());  // as they are run
    for (const moe_layer & layer : index.layers()) {
        CHECK(!layer.projections[0].is_down && layer.projections[1].is_down);
    }
}

TEST("blocks for multi-token prediction are not run, so not offloaded") {
    const tiny_model m;
    const auto       with_mtp = [&](gguf_context * g) {
        m.meta()(g);
        gguf_set_val_u32(g, "tiny.nextn_predict_layers", 1);
    };
    const model_story  s(m.all(), with_mtp);
    const expert_index index = s.open();
    CHECK_EQ(index.layers().size(), 2u);
    CHECK_EQ(index.layers()[1].block, 2u);
    CHECK_EQ(index.find("blk.3.ffn_up_exps.weight").first, -1);
    CHECK(!std::regex_search("blk.3.ffn_up_exps.weight", std::regex(index.tensor_pattern())));
    CHECK(std::regex_search("blk.2.ffn_up_exps.weight", std::regex(index.tensor_pattern())));
}

TEST("a split model is one model") {
    const tiny_model  m;
    const model_story s(m), split;
    write_split(split, m, 3);
    const expert_index whole = s.open(), parts(split.path("model-00001-of-00003.gguf"), "", false);
    CHECK_EQ(parts.bytes_dense, whole.bytes_dense);
    CHECK_EQ(parts.bytes_total[0], whole.bytes_total[0]);
    CHECK(parts.has_low);
    std::set<uint16_t> used;
    for (size_t l = 0; l < whole.layers().size(); ++l) {
        for (size_t p = 0; p < 3; ++p) {
            const projection &    proj = parts.layers()[l].projections[p];
            const tensor_source & src  = proj.source[0];
            CHECK_EQ(proj.name, whole.layers()[l].projections[p].name);
            CHECK_EQ(src.offset, offset_by_ggml(parts.source(src.file).path(), proj.name));
            used.insert(src.file);
        }
    }
    CHECK(used.size() >= 2);
}

TEST("a split model without one of its parts, or opened by a later part, is refused") {
    const model_story s;
    write_split(s, tiny_model {}, 3);
    CHECK_EQ(model_story::refusal_of(s.path("model-00002-of-00003.gguf")), HOBBIT_ERR_FORMAT);
    std::filesystem::remove(s.path("model-00003-of-00003.gguf"));
    CHECK_EQ(model_story::refusal_of(s.path("model-00001-of-00003.gguf")), HOBBIT_ERR_FILE);
}

TEST("parts in the wrong order, of another division or of another model are refused") {
    const auto part  = [](const model_story & s, int no, int n) { return s.path(format("model-%05d-of-%05d.gguf", no, n)); };
    const auto story = [&](const tiny_model & m, uint16_t n) {
        auto s = std::make_unique<model_story>();
        write_split(*s, m, n);
        return s;
    };
    const auto s = story(tiny_model {}, 3);
    CHECK_EQ(model_story::refusal_of(part(*s, 1, 3)), HOBBIT_OK);
    std::filesystem::rename(part(*s, 2, 3), s->path("x"));
    std::filesystem::rename(part(*s, 3, 3), part(*s, 2, 3));
    std::filesystem::rename(s->path("x"), part(*s, 3, 3));
    CHECK_EQ(model_story::refusal_of(part(*s, 1, 3)), HOBBIT_ERR_FORMAT);

    const auto two = story(tiny_model {}, 2), three = story(tiny_model {}, 3);
    std::filesystem::copy(part(*two, 2, 2), part(*three, 2, 3), std::filesystem::copy_options::overwrite_existing);
    CHECK_EQ(model_story::refusal_of(part(*three, 1, 3)), HOBBIT_ERR_FORMAT);

    tiny_model larger;
    larger.n_layer   = 4;
    const auto other = story(larger, 3), mixed = story(tiny_model {}, 3);
    std::filesystem::copy(part(*other, 3, 3), part(*mixed, 3, 3), std::filesystem::copy_options::overwrite_existing);
    CHECK_EQ(model_story::refusal_of(part(*mixed, 1, 3)), HOBBIT_ERR_FORMAT);
}

TEST("a dense model is refused as such") {
    CHECK_EQ(model_story(tiny_model {}.dense(), tiny_model {}.meta()).refusal(), HOBBIT_ERR_NOT_MOE);
    CHECK_EQ(model_story(tiny_tensors {}, tiny_model {}.meta()).refusal(), HOBBIT_ERR_NOT_MOE);
}

TEST("a file that is not there, and a folder, are refused with the system's reason") {
    tiny_model m;
    m.low = false;
    const model_story s(m);
    CHECK_EQ(model_story::refusal_of(s.path("nowhere.gguf")), HOBBIT_ERR_FILE);
    CHECK_EQ(model_story::refusal_of(s.path("")), HOBBIT_ERR_FILE);
    CHECK_EQ(s.refusal(s.path("nowhere.gguf")), HOBBIT_ERR_FILE);
    try {
        expert_index index(s.path("nowhere.gguf"), "", true);
    } catch (const error & e) {
        CHECK_EQ(e.os_errno(), ENOENT);
    }
}

TEST("a model whose tensors contradict each other is refused") {
    tiny_model m;
    m.low                     = false;
    const std::string low     = "hobbit.low.blk.1.ffn_up_exps.weight";
    const auto        refused = [&](const test::tiny_tensor & more) {
        return model_story(with(m.all(), more), m.meta()).refusal();
    };
    CHECK_EQ(refused({ low, GGML_TYPE_Q4_0, { 64, 48, 8 } }), HOBBIT_OK);
    CHECK_EQ(refused({ low, GGML_TYPE_Q4_0, { 64, 64, 8 } }), HOBBIT_ERR_FORMAT);
    CHECK_EQ(refused({ low, GGML_TYPE_Q4_0, { 32, 48, 8 } }), HOBBIT_ERR_FORMAT);
    CHECK_EQ(refused({ low, GGML_TYPE_Q4_0, { 64, 48, 7 } }), HOBBIT_ERR_FORMAT);
    CHECK_EQ(refused({ "hobbit.low.blk.9.ffn_up_exps.weight", GGML_TYPE_Q4_0, { 64, 48, 8 } }), HOBBIT_ERR_FORMAT);
    CHECK_EQ(refused({ "blk.1.ffn_x_exps.weight", GGML_TYPE_F16, { 64, 48, 7 } }), HOBBIT_ERR_FORMAT);
}

TEST("more projections than are supported are refused") {
    tiny_tensors tensors = tiny_model {}.high();
    for (const char * name : { "blk.1.ffn_a_exps.weight", "blk.1.ffn_b_exps.weight" }) {
        tensors.push_back({ name, GGML_TYPE_F16, { 64, 48, 8 } });
    }
    CHECK_EQ(model_story(tensors, tiny_model {}.meta()).refusal(), HOBBIT_ERR_UNSUPPORTED);
}

TEST("more experts than a 16-bit number can tell apart are refused") {
    const tiny_tensors tensors = { { "blk.0.ffn_up_exps.weight", GGML_TYPE_F16, { 1, 1, 70000 } },
                                   { "blk.0.ffn_down_exps.weight", GGML_TYPE_F16, { 1, 1, 70000 } } };
    CHECK_EQ(model_story(tensors, tiny_model {}.meta()).refusal(), HOBBIT_ERR_UNSUPPORTED);
}

TEST("experts without weights in them are refused") {
    const tiny_tensors tensors = { { "blk.0.ffn_up_exps.weight", GGML_TYPE_F32, { 0, 4, 8 } },
                                   { "blk.0.ffn_down_exps.weight", GGML_TYPE_F32, { 4, 0, 8 } } };
    CHECK_EQ(model_story(tensors, tiny_model {}.meta()).refusal(), HOBBIT_ERR_FORMAT);
}

TEST("layers may use different numbers of experts, of which the largest serves for sizes") {
    const tiny_model   m;
    const model_story  s(m.all(), [&](gguf_context * g) {
        const int32_t used[] = { 0, 1, 3, 2 };  // by block; the first is dense
        gguf_set_val_str(g, "general.architecture", "tiny");
        gguf_set_val_u32(g, "tiny.block_count", m.n_layer + 1);
        gguf_set_arr_data(g, "tiny.expert_used_count", GGUF_TYPE_INT32, used, 4);
    });
    const expert_index index = s.open();
    CHECK_EQ(index.n_expert_used, 3u);
    CHECK(index.layers()[0].n_used == 1 && index.layers()[1].n_used == 3 && index.layers()[2].n_used == 2);
}

TEST("a model that does not say how many experts a token uses is refused") {
    for (const int n_used : { -1, 0, 9, 1 << 30 }) {
        const model_story s(tiny_model {}.all(), [=](gguf_context * g) {
            gguf_set_val_str(g, "general.architecture", "tiny");
            if (n_used >= 0) {
                gguf_set_val_u32(g, "tiny.expert_used_count", (uint32_t) n_used);
            }
        });
        CHECK_EQ(s.refusal(), HOBBIT_ERR_FORMAT);
    }
    CHECK_EQ(model_story(tiny_model {}.all(), [](gguf_context *) {}).refusal(), HOBBIT_ERR_FORMAT);
}

TEST("a file cut anywhere is refused, never read as something else") {
    const model_story s(tiny_model {});
    const test::bytes whole = test::read_all(s.path());
    const uint64_t    first = offset_by_ggml(s.path(), "token_embd.weight");
    const std::string last  = "hobbit.low.blk.3.ffn_up_exps.weight";  // 8 experts of 1728 bytes
    CHECK(whole.size() >= offset_by_ggml(s.path(), last) + 8 * 1728);
    std::vector<size_t> sizes;
    for (size_t n = 0; n < first + 64; n += n < 400 || n + 200 > first ? 1 : 97) {
        sizes.push_back(n);
    }
    for (size_t n = first; n < offset_by_ggml(s.path(), last) + 8 * 1728; n += 9973) {
        sizes.push_back(n);
    }
    sizes.push_back(offset_by_ggml(s.path(), last) + 8 * 1728 - 1);
    for (const size_t n : sizes) {
        test::write_all(s.path("cut.gguf"), test::bytes(whole.begin(), whole.begin() + (long) n));
        CHECK_EQ(std::to_string(n) + ": " + std::to_string(model_story::refusal_of(s.path("cut.gguf"))),
                 std::to_string(n) + ": " + std::to_string(HOBBIT_ERR_FORMAT));
    }
}

TEST("garbage is refused") {
    tiny_model m;
    m.low = false;
    const model_story s(m);
    test::write_all(s.path("empty.gguf"), {});
    CHECK_EQ(model_story::refusal_of(s.path("empty.gguf")), HOBBIT_ERR_FORMAT);
    for (uint32_t seed = 0; seed < 50; ++seed) {
        test::bytes content = test::content(seed, 10000);
        if (seed % 2) {
            const unsigned char magic[8] = { 'G', 'G', 'U', 'F', 3, 0, 0, 0 };
            std::copy_n(magic, 8, content.begin());
        }
        test::write_all(s.path("garbage.gguf"), content);
        CHECK_EQ(model_story::refusal_of(s.path("garbage.gguf")), HOBBIT_ERR_FORMAT);
        CHECK_EQ(s.refusal(s.path("garbage.gguf")), HOBBIT_ERR_SIDECAR);
    }
}

TEST("a header with a damaged byte is read or refused, and nothing worse") {
    const model_story s(tiny_model {});
    const test::bytes whole  = test::read_all(s.path());
    const uint64_t    header = offset_by_ggml(s.path(), "token_embd.weight");
    std::mt19937      random(5);
    for (int i = 0; i < 1500; ++i) {
        test::bytes content = whole;
        content[random() % header] ^= (unsigned char) (1u << random() % 8);
        test::write_all(s.path("damaged.gguf"), content);
        model_story::refusal_of(s.path("damaged.gguf"));  // lets through what is not hobbit::error
    }
}

TEST_MAIN()
