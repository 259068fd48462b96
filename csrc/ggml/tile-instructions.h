// Which sets of vector instructions the tiles are built for, and what differs between those of 256 bits.
#pragma once

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#    define HOBBIT_TILES
#    if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
        defined(__AVX512VNNI__)
#        define HOBBIT_TILES_AVX512
#    endif
#    if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
#        define HOBBIT_TILES_VNNI
#    endif
#    include <immintrin.h>
#endif

#ifdef HOBBIT_TILES_VNNI

namespace hobbit {

// sum + the sums of four products each, of bytes without sign by bytes with sign.
inline __m256i add_products(__m256i sum, __m256i u, __m256i s) {
#    ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(sum, u, s);
#    else
    return _mm256_dpbusd_epi32(sum, u, s);
#    endif
}

}  // namespace hobbit

#endif
