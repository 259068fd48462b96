// MUL_MAT_ID on experts that live in the store: ggml's kernels on the same data, or those that give the same bits (operand.h); only where
// the slices lie and the order of the experts differ.
//
//     dst[:, slot, token] = expert[ids[slot, token]] * src1[:, slot % ne11, token]
#include "expert-buffer.h"

#include "../base/error.h"
#include "operand.h"

// upstream, private
#include "tiled/tiled.h"

#include <algorithm>
#include <chrono>
#include <cstring>

namespace hobbit {

namespace {

using steady = std::chrono::steady_clock;

double seconds_since(steady::time_point begin) { return std::chrono::duration<double>(steady::now() - begin).count(); }

size_t aligned(size_t n) { return (n + 63) / 64 * 64; }

class product {
  public:
    product(const expert_tensor & expert, ggml_compute_params * params, ggml_tensor * op) :
        expert_(expert),
        owner_(expert.owner()),
        layer_(owner_.index().layers()[expert.layer()]),
        part_(expert.part()),
        params_(params),
        op_(op) {}

    void run(layer_pass & pass) {
        const auto begin = steady::now();
        prepare(pass);
        ggml_barrier(params_->threadpool);
        // First of all, by one thread while the others compute: what is predicted now is read meanwhile.
        owner_.predict_pending();
        work(pass);
        owner_.places().settle(params_->ith, params_->nth);
        if (params_->ith == 0) {
            pass.parts_done |= 1u << part_;
            collect_inputs(pass);
            hobbit_counts c  = {};
            c.stall_seconds  = stalled_;
            c.expert_seconds = seconds_since(begin) - stalled_;
            owner_.store()->add_counts(pass.layer(), c);
            if (owner_.times().on()) {
                owner_.times().add(HOBBIT_EVENT_EXPERTS, layer_.block, begin, steady::now());
            }
        }
    }

  private:
    void collect_inputs(const layer_pass & pass) {
        const ggml_tensor * x = op_->src[1];
        if (owner_.inputs().on()) {
            try {
                owner_.inputs().add(expert_.layer(), part_, pass,
                                    { x->data, x->ne[1], x->ne[2], x->nb[1], x->nb[2], (uint32_t) op_->src[2]->ne[0],
                                      !layer_.projections[part_].is_down });
            } catch (...) {
                owner_.record_failure(std::current_exception());
            }
        }
    }

    void prepare(layer_pass & pass) {
        const ggml_tensor * src1 = op_->src[1];
        char *              w    = (char *) params_->wdata;
        for (int p = 0; p < N_PRECISION; ++p) {
            operand & o = operands_[p];
            o.used      = pass.uses((precision) p);
            if (!o.used) {
                continue;
            }
            make_operand(o, op_, layer_.projections[part_].source[p]);
            if (p == 0 && expert_.repacked() != nullptr) {
                o.repacked = expert_.repacked();
                o.tiles    = expert_.repacked_tiles();
            }
            const ggml_type type = kernel_type(o.weights.type);
            if (src1->type == type) {
                o.rows          = (const char *) src1->data;
                o.row_stride[0] = src1->nb[1];
                o.row_stride[1] = src1->nb[2];
                continue;
            }
            const size_t row = ggml_row_size(type, src1->ne[0]);
            o.row_stride[0]  = row;
            o.row_stride[1]  = row * src1->ne[1];
            if (p == 1 && operands_[0].used && kernel_type(operands_[0].weights.type) == type) {
                o.rows = operands_[0].rows;
                continue;
            }
            o.rows = w;
            convert_rows(params_, src1, type, w);
            w += aligned(row * src1->ne[1] * src1->ne[2]);
        }
        scratch_ = (char *) params_->wdata + params_->wsize - tiled_bytes();
        scratch_ = (char *) ((uintptr_t) scratch_ / 64 * 64);
        if (params_->ith == 0) {
            for (const pass_row & at : pass.skipped()) {
                memset((char *) op_->data + at.slot * op_->nb[1] + at.token * op_->nb[2], 0, op_->ne[0] * sizeof(float));
            }
            pass.begin_streams(part_);
        }
    }

    size_t tiled_bytes() {
        size_t n = 0;
        for (operand & o : operands_) {
            n = o.used ? std::max(n, ggml_tiled_wdata_size(params_->nth, &o.result)) : n;
        }
        return n;
    }

    // ggml's tiled kernel, where it takes the type and the number of rows: each thread does its share of the expert.
    bool multiply_tiled(const layer_pass & pass, const pass_item & item, const std::byte * slice) {
        operand & o = operands_[(int) item.prec];
        if (o.repacked != nullptr) {
            return false;
        }
        o.weights.data           = (void *) slice;
        ggml_compute_params mine = *params_;
        mine.wdata               = (void *) o.rows;
        return ggml_compute_forward_mul_mat_id_tiled(&mine, &o.result, 0, item.n_rows,
                                                     (const int32_t *) &pass.rows()[item.first_row], scratch_);
    }

    // Whatever can be done on the item now. True when this thread is through with it.
    bool advance(layer_pass & pass, size_t i) {
        const pass_item & item  = pass.items()[i];
        const std::byte * slice = pass.slice(part_, i);
        if (slice == nullptr) {
            return pass.at(part_, i).next.load(std::memory_order_relaxed) > 0;  // others have finished it already
        }
        layer_pass::progress & progress = pass.at(part_, i);
        const operand &        o        = operands_[(int) item.prec];
        if (multiply_tiled(pass, item, slice)) {
            if (item.entry == nullptr && progress.finished.fetch_add(1, std::memory_order_acq_rel) + 1 == params_->nth) {
                pass.item_done(part_, i);
            }
            return true;
        }
        const cut pieces(o, item.n_rows, params_->nth);
        while (true) {
            const int32_t piece = progress.next.fetch_add(1, std::memory_order_relaxed);
            if (piece >= pieces.n) {
                return true;
            }
            const int64_t r0 = piece % pieces.n_row_pieces * pieces.rows;
            const int64_t c0 = piece / pieces.n_row_pieces * pieces.cols;
            multiply(o, op_, (const char *) slice, &pass.rows()[item.first_row], r0,
                     std::min(r0 + pieces.rows, o.weights.ne[1]), c0, std::min<int64_t>(c0 + pieces.cols, item.n_rows));
            // Only a streamed item has a slot to hand on.
            if (item.entry == nullptr && progress.finished.fetch_add(1, std::memory_order_acq_rel) + 1 == pieces.n) {
                pass.item_done(part_, i);
            }
        }
    }

    void work(layer_pass & pass) {
        thread_local std::vector<uint32_t> left;  // items this thread is not through with
        left.resize(pass.items().size());
        // Bound by memory, each thread begins with another expert and reads its slice in one stream. Else they share what one of them has
        // brought near.
        const bool   few   = pass.rows().size() < MANY_ROWS * left.size();
        const size_t first = few ? (size_t) params_->ith * left.size() / (size_t) params_->nth : 0;
        for (size_t i = 0; i < left.size(); ++i) {
            left[i] = (uint32_t) ((i + first) % left.size());
        }
        expert_store & store = *owner_.store();
        while (!left.empty()) {
            const uint64_t seen   = store.arrivals();
            const size_t   before = left.size();
            left.erase(std::remove_if(left.begin(), left.end(), [&](uint32_t i) { return advance(pass, i); }), left.end());
            if (left.empty() || owner_.failed()) {
                break;
            }
            if (left.size() == before) {
                if (owner_.predict_pending()) {
                    continue;
                }
                const auto begin = steady::now();
                store.wait(seen);
                stalled_ += seconds_since(begin);
                if (params_->ith == 0 && owner_.times().on()) {
                    owner_.times().add(HOBBIT_EVENT_STALL, layer_.block, begin, steady::now());
                }
            }
        }
        left.clear();
    }

    const expert_tensor & expert_;
    session &             owner_;
    const moe_layer &     layer_;
    uint32_t              part_;
    ggml_compute_params * params_;
    ggml_tensor *         op_;
    operand               operands_[N_PRECISION];
    char *                scratch_ = nullptr;
    double                stalled_ = 0.0;
};

}  // namespace

bool expert_tensor::work_size(int n_threads, const ggml_tensor * op, size_t & size) {
    if (op->op != GGML_OP_MUL_MAT_ID || find_expert_tensor(op->src[0]) != this) {
        return false;
    }
    const ggml_tensor * src1  = op->src[1];
    size_t              rows  = 0;
    size_t              tiled = 0;
    for (const tensor_source & source : owner().index().layers()[layer_].projections[part_].source) {
        if (source.type < 0) {
            continue;
        }
        operand o;
        make_operand(o, op, source);
        rows += aligned(ggml_row_size(kernel_type(source.type), src1->ne[0]) * src1->ne[1] * src1->ne[2]);
        tiled = std::max(tiled, ggml_tiled_wdata_size(n_threads, &o.result));
    }
    size = rows + tiled + 128;
    return true;
}

bool expert_tensor::compute_forward(ggml_compute_params * params, ggml_tensor * op) {
    session & owner = this->owner();
    if (!takes_or_refuses(params->ith, op)) {
        return true;
    }
    const ggml_tensor * ids = op->src[2];
    if (!owner.running()) {
        if (params->ith == 0) {
            memset(op->data, 0, ggml_nbytes(op));
            owner.record_failure(std::make_exception_ptr(
                error(HOBBIT_ERR_STATE, 0, "the model was used before its expert pool was made or after it was closed")));
        }
        return true;
    }
    // A read can fail at any moment, so nothing before the last barrier may depend on failed(): threads would part ways.
    // A graph without our node before the products (build_route declined): the ids are all there is, so all in high precision.
    const layer_pass & last  = *owner.pass();
    const bool         known = last.key == ids && last.layer() == layer_ && (last.parts_done & 1u << part_) == 0;
    if (!known) {
        ggml_barrier(params->threadpool);  // all threads have looked
        if (params->ith == 0) {
            layer_pass::selections sel;
            sel.ids        = (const int32_t *) ids->data;
            sel.ids_stride = ids->nb[1] / sizeof(int32_t);
            sel.k          = (uint32_t) ids->ne[0];
            sel.n_tokens   = (uint32_t) ids->ne[1];
            owner.route(layer_, ids, sel, (int32_t *) ids->data, {}, nullptr);
        }
        ggml_barrier(params->threadpool);
    }
    product(*this, params, op).run(*owner.pass());
    return true;
}

}  // namespace hobbit
