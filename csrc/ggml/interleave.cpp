#include "interleave.h"

#include "ggml.h"

// upstream, private
#include "repack.h"

#include <cstdint>
#include <cstring>

namespace hobbit {

namespace {

constexpr int ROWS  = 8;
constexpr int CHUNK = 8;  // bytes of quants that stay together

// Quants of row j; the rows take turns, eight bytes each.
template <size_t bytes>
void put_quants(uint8_t * to, const uint8_t (&quants)[bytes], int j) {
    for (size_t c = 0; c < bytes / CHUNK; ++c) {
        memcpy(to + (c * ROWS + j) * CHUNK, quants + c * CHUNK, CHUNK);
    }
}

// Scales and minimums of the super-blocks of eight rows, and their quants.
template <typename wide_t, typename block_t>
void interleave_block(wide_t & to, const block_t * from, int64_t stride) {
    for (int j = 0; j < ROWS; ++j) {
        const block_t & row = from[j * stride];
        memcpy(&to.d[j], &row.GGML_COMMON_AGGR_U.GGML_COMMON_AGGR_S.d, sizeof(ggml_half));
        memcpy(&to.dmin[j], &row.GGML_COMMON_AGGR_U.GGML_COMMON_AGGR_S.dmin, sizeof(ggml_half));
        put_quants(to.qs, row.qs, j);
    }
}

// Byte i of word j <-> byte j of word i.
void transpose_bytes(uint64_t (&w)[8]) {
    for (int i : { 0, 2, 4, 6 }) {
        const uint64_t t = ((w[i] >> 8) ^ w[i + 1]) & 0x00ff00ff00ff00ff;
        w[i + 1] ^= t;
        w[i] ^= t << 8;
    }
    for (int i : { 0, 1, 4, 5 }) {
        const uint64_t t = ((w[i] >> 16) ^ w[i + 2]) & 0x0000ffff0000ffff;
        w[i + 2] ^= t;
        w[i] ^= t << 16;
    }
    for (int i : { 0, 1, 2, 3 }) {
        const uint64_t t = ((w[i] >> 32) ^ w[i + 4]) & 0x00000000ffffffff;
        w[i + 4] ^= t;
        w[i] ^= t << 32;
    }
}

constexpr uint64_t each(uint8_t byte) { return byte * 0x0101010101010101; }

// 6-bit scales and minimums of one sub-block, a byte for each row, packed as Q4_K packs the eight sub-blocks of one row.
void pack_sub_block(uint8_t * to, uint64_t scales, uint64_t mins) {
    const auto     s0 = (uint32_t) scales, s4 = (uint32_t) (scales >> 32);
    const auto     m0 = (uint32_t) mins, m4 = (uint32_t) (mins >> 32);
    const uint32_t packed[3] = {
        s0 | (s4 & 0x30303030) << 2,
        m0 | (m4 & 0x30303030) << 2,
        (s4 & 0x0f0f0f0f) | (m4 & 0x0f0f0f0f) << 4,
    };
    memcpy(to, packed, sizeof(packed));
}

}  // namespace

int interleave_q4_K(ggml_tensor * group, const void * plain, size_t) {
    const int64_t n  = group->ne[0] / QK_K;
    auto *        to = (block_q4_Kx8 *) group->data;
    for (int64_t x = 0; x < n; ++x) {
        const block_q4_K * from = (const block_q4_K *) plain + x;
        interleave_block(to[x], from, n);
        // Of each row: bytes 0 to 3 the scales of sub-blocks 0 to 3 and two bits of 4 to 7, bytes 4 to 7 the same of the minimums, bytes
        // 8 to 11 four bits each of scales and minimums of 4 to 7. Transposed, a word holds one of these bytes of all rows.
        uint64_t begin[ROWS];
        uint64_t end[ROWS];
        for (int j = 0; j < ROWS; ++j) {
            uint32_t last;
            memcpy(&begin[j], from[j * n].scales, 8);
            memcpy(&last, from[j * n].scales + 8, 4);
            end[j] = last;
        }
        transpose_bytes(begin);
        transpose_bytes(end);
        for (int i = 0; i < 4; ++i) {
            pack_sub_block(to[x].scales + i * 12, begin[i] & each(0x3f), begin[i + 4] & each(0x3f));
            pack_sub_block(to[x].scales + (i + 4) * 12, (begin[i] >> 2 & each(0x30)) | (end[i] & each(0x0f)),
                           (begin[i + 4] >> 2 & each(0x30)) | (end[i] >> 4 & each(0x0f)));
        }
    }
    return 0;
}

int interleave_q2_K(ggml_tensor * group, const void * plain, size_t) {
    const int64_t n  = group->ne[0] / QK_K;
    auto *        to = (block_q2_Kx8 *) group->data;
    for (int64_t x = 0; x < n; ++x) {
        const block_q2_K * from = (const block_q2_K *) plain + x;
        interleave_block(to[x], from, n);
        for (int j = 0; j < ROWS; ++j) {
            for (int pair = 0; pair < QK_K / 32; ++pair) {
                memcpy(to[x].scales + (pair * ROWS + j) * 2, from[j * n].scales + pair * 2, 2);
            }
        }
    }
    return 0;
}

}  // namespace hobbit
