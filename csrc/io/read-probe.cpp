#include "read-probe.h"

#include "../base/error.h"
#include "io-pool.h"

#include <algorithm>
#include <chrono>
#include <random>

namespace hobbit {

namespace {

using steady = std::chrono::steady_clock;

// Draws slices: a layer, a projection and an expert, each alike.
class slice_source {
  public:
    slice_source(const expert_index & index, precision p) : index_(index), p_((int) p), random_(std::random_device {}()) {}

    io_request next(std::byte * room, uint32_t slot) {
        const auto & layer  = index_.layers()[draw((uint32_t) index_.layers().size())];
        const auto & source = layer.projections[draw((uint32_t) layer.projections.size())].source[p_];
        const extent e      = source.expert(draw(layer.n_expert));
        io_request   r      = request_of(index_.source(e.file), e, room);
        r.part              = slot;
        return r;
    }

  private:
    uint32_t draw(uint32_t n) { return std::uniform_int_distribution<uint32_t>(0, n - 1)(random_); }

    const expert_index & index_;
    const int            p_;
    std::mt19937         random_;
};

}  // namespace

read_probe_result probe_reads(const expert_index & index, precision p, uint32_t depth, double seconds) {
    for (const auto & layer : index.layers()) {
        for (const auto & projection : layer.projections) {
            if (projection.source[(int) p].type < 0) {
                fail(HOBBIT_ERR_STATE, "there are no copies in this precision to read");
            }
        }
    }
    // In whole large pages, as the expert pool is: into small ones a disk of 3.3 GB/s gives 1.4.
    const size_t      bytes  = align_up(depth * index.max_segment, LARGE_PAGE);
    region            memory = region::reserve(bytes);
    std::byte * const rooms  = memory.data();
    memory.populate(0, bytes);
    read_probe_result  out;
    slice_source       source(index, p);
    std::mutex         mutex;  // guards out, source and failure
    std::exception_ptr failure;
    const auto         begin = steady::now();
    const auto         end   = begin + std::chrono::duration_cast<steady::duration>(std::chrono::duration<double>(seconds));
    io_pool *          pool  = nullptr;

    // Each read that ends begins the next one in its room, so that as many as there are threads are always under way.
    io_pool io(depth, PAGE, 0, [&](const io_request & ended, io_outcome outcome, std::exception_ptr why) {
        io_request next;
        {
            std::lock_guard<std::mutex> lock(mutex);
            if (outcome == io_outcome::failed) {
                failure = why;
            } else {
                out.reads++;
                out.bytes += ended.bytes;
            }
            if (failure || steady::now() >= end) {
                return;
            }
            next = source.next(ended.dst, ended.part);
        }
        pool->demand({ next });
    });
    pool = &io;
    std::vector<io_request> first;
    for (uint32_t i = 0; i < depth; ++i) {
        first.push_back(source.next(rooms + i * index.max_segment, i));
    }
    io.demand(first);
    io.drain();
    out.seconds = std::chrono::duration<double>(steady::now() - begin).count();
    if (failure) {
        std::rethrow_exception(failure);
    }
    return out;
}

}  // namespace hobbit
