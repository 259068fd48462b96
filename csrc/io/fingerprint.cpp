#include "fingerprint.h"

#include "expert-index.h"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

// of upstream's vendored libraries
extern "C" {
#include <hash/sha256/sha256.h>
}

namespace hobbit {

namespace {

// Both are part of the format: another number makes other fingerprints.
constexpr uint64_t N_SAMPLES    = 4;
constexpr uint64_t SAMPLE_BYTES = 4096;

class sha256 {
  public:
    sha256() { sha256_init(&state_); }

    void add(const void * data, size_t size) { sha256_update(&state_, (const unsigned char *) data, size); }

    // Little-endian, whatever the machine.
    void add(uint64_t n) {
        unsigned char bytes[8];
        for (int i = 0; i < 8; ++i) {
            bytes[i] = (unsigned char) (n >> (8 * i));
        }
        add(bytes, sizeof(bytes));
    }

    std::string hex() {
        std::array<unsigned char, SHA256_DIGEST_SIZE> digest;
        sha256_final(&state_, digest.data());
        std::string out;
        for (const unsigned char byte : digest) {
            out += "0123456789abcdef"[byte >> 4];
            out += "0123456789abcdef"[byte & 15];
        }
        return out;
    }

  private:
    sha256_t state_;
};

}  // namespace

std::string fingerprint(const expert_index & index) {
    std::vector<std::pair<const projection *, const moe_layer *>> all;
    for (const moe_layer & layer : index.layers()) {
        for (const projection & p : layer.projections) {
            all.emplace_back(&p, &layer);
        }
    }
    std::sort(all.begin(), all.end(), [](const auto & a, const auto & b) { return a.first->name < b.first->name; });

    sha256 hash;
    region staging;
    for (const auto & [p, layer] : all) {
        const tensor_source & src = p->source[0];
        hash.add(p->name.size());
        hash.add(p->name.data(), p->name.size());
        for (const uint64_t n :
             { (uint64_t) src.type, (uint64_t) p->n_in, (uint64_t) p->n_out, (uint64_t) layer->n_expert }) {
            hash.add(n);
        }
        const file &   f     = index.source(src.file);
        const uint64_t bytes = src.slice * layer->n_expert;
        const uint64_t n     = std::min(bytes, SAMPLE_BYTES);
        const uint64_t count = bytes <= N_SAMPLES * SAMPLE_BYTES ? (bytes + n - 1) / n : N_SAMPLES;
        for (uint64_t i = 0; i < count; ++i) {
            const uint64_t offset = src.offset + (count == 1 ? 0 : (bytes - n) * i / (count - 1));
            hash.add(f.read_any(offset, n, staging), n);
        }
    }
    return "sha256:" + hash.hex();
}

}  // namespace hobbit
