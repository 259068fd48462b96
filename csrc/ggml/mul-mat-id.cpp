// MUL_MAT_ID on experts that live in the store: the same kernels on the same data in the same batch widths as ggml's own, so the
// same bits; only where the slices lie and the order of the experts differ.
//
//     dst[:, slot, token] = expert[ids[slot, token]] * src1[:, slot % ne11, token]
#include "expert-buffer.h"

#include "../base/error.h"
#include "interleave.h"

#include "ggml-cpu.h"

// upstream, private
#include "ggml-cpu-impl.h"
#include "tiled/tiled.h"

#include <algorithm>
#include <chrono>
#include <cstring>

namespace hobbit {

namespace {

using steady = std::chrono::steady_clock;

double seconds_since(steady::time_point begin) { return std::chrono::duration<double>(steady::now() - begin).count(); }

// One source type: a slice of one expert seen as a tensor of a single expert, and src1 in the type its kernel wants.
struct operand {
    bool                  used = false;
    ggml_tensor           weights;                   // ne[2] = 1, data set per expert
    ggml_tensor           result;                    // dst with src[0] = &weights
    const char *          rows          = nullptr;   // src1 rows in vec_dot_type
    size_t                row_stride[2] = { 0, 0 };  // bytes along i11, i12
    ggml_vec_dot_t        vec_dot       = nullptr;
    const repack_kernel * repacked      = nullptr;  // instead of vec_dot, where the slices are repacked
    bool                  by_gemm       = false;    // of it, for four batch rows and more
};

constexpr int64_t GEMM_ROWS = 16;

size_t aligned(size_t n) { return (n + 63) / 64 * 64; }

ggml_type kernel_type(int32_t type) { return ggml_get_type_traits_cpu((ggml_type) type)->vec_dot_type; }

// The slice of `op->src[0]` at another type, as ggml sees a tensor.
void make_operand(operand & o, const ggml_tensor * op, const tensor_source & source) {
    o.weights        = *op->src[0];
    o.weights.type   = (ggml_type) source.type;
    o.weights.extra  = nullptr;
    o.weights.buffer = nullptr;
    o.weights.ne[2]  = 1;
    o.weights.nb[0]  = ggml_type_size(o.weights.type);
    o.weights.nb[1]  = source.row_bytes;
    o.weights.nb[2]  = source.slice;
    o.weights.nb[3]  = source.slice;
    o.result         = *op;
    o.result.src[0]  = &o.weights;
    o.vec_dot        = ggml_get_type_traits_cpu(o.weights.type)->vec_dot;
}

// src1 -> `to`, in the type of the kernel, all threads together: a stripe of every row each, as ggml does it.
void convert_rows(const ggml_compute_params * params, const ggml_tensor * src1, ggml_type type, char * to) {
    const auto    from_float = ggml_get_type_traits_cpu(type)->from_float;
    const int64_t block      = ggml_blck_size(type);
    const size_t  row        = ggml_row_size(type, src1->ne[0]);
    const int64_t begin      = (params->ith * src1->ne[0] / block) / params->nth;
    const int64_t end        = ((params->ith + 1) * src1->ne[0] / block) / params->nth;
    for (int64_t i12 = 0; i12 < src1->ne[2]; ++i12) {
        for (int64_t i11 = 0; i11 < src1->ne[1]; ++i11) {
            const auto * x = (const float *) ((const char *) src1->data + i12 * src1->nb[2] + i11 * src1->nb[1]);
            from_float(x + begin * block, to + (i12 * src1->ne[1] + i11) * row + begin * ggml_type_size(type),
                       (end - begin) * block);
        }
    }
}

// Rows [r0, r1) of the expert's matrix times the batch rows [c0, c1) of its list.
void multiply_block(const operand & o, ggml_tensor * dst, const char * slice, const pass_row * rows, int64_t r0, int64_t r1,
                    int64_t c0, int64_t c1) {
    const int64_t ne00 = o.weights.ne[0];
    const int64_t ne11 = dst->src[1]->ne[1];
    const size_t  nb01 = o.weights.nb[1];
    float         tmp[16];
    for (int64_t cc = c0; cc < c1; cc += 16) {
        for (int64_t rr = r0; rr < r1; rr += 16) {
            const int64_t r_end = std::min(rr + 16, r1);
            for (int64_t c = cc; c < std::min(cc + 16, c1); ++c) {
                const pass_row at  = rows[c];
                const char *   x   = o.rows + (at.slot % ne11) * o.row_stride[0] + at.token * o.row_stride[1];
                auto *         out = (float *) ((char *) dst->data + at.slot * dst->nb[1] + at.token * dst->nb[2]);
                for (int64_t r = rr; r < r_end; ++r) {
                    o.vec_dot((int) ne00, &tmp[r - rr], 0, slice + r * nb01, 0, x, 0, 1);
                }
                memcpy(out + rr, tmp, (r_end - rr) * sizeof(float));
            }
        }
    }
}

// The same for a repacked slice; r0 and r1 are multiples of the kernel's columns. As ggml does it, one batch row at a time; where the
// operand allows, GEMM_ROWS of them, fours at least.
void multiply_repacked(const operand & o, ggml_tensor * dst, const char * slice, const pass_row * rows, int64_t r0,
                       int64_t r1, int64_t c0, int64_t c1) {
    if (r0 >= r1) {
        return;
    }
    const auto    n    = (int) o.weights.ne[0];
    const auto    n_r  = (int) (r1 - r0);
    const int64_t ne11 = dst->src[1]->ne[1];
    const char *  w    = slice + r0 * o.weights.nb[1];
    const auto    x    = [&](int64_t c) {
        return o.rows + (rows[c].slot % ne11) * o.row_stride[0] + rows[c].token * o.row_stride[1];
    };
    const auto out = [&](int64_t c) {
        return (float *) ((char *) dst->data + rows[c].slot * dst->nb[1] + rows[c].token * dst->nb[2]) + r0;
    };
    int64_t c = c0;
    if (o.by_gemm) {
        thread_local std::vector<char>  inputs;
        thread_local std::vector<float> results;
        const ggml_type                 type = kernel_type(o.weights.type);
        const size_t                    row  = ggml_row_size(type, n);
        inputs.resize(row * GEMM_ROWS);
        results.resize((size_t) n_r * GEMM_ROWS);
        while (c1 - c >= 4) {
            const int64_t n_c = std::min<int64_t>(GEMM_ROWS, (c1 - c) / 4 * 4);
            for (int64_t i = 0; i < n_c; i += 4) {
                const char * const four[4] = { x(c + i), x(c + i + 1), x(c + i + 2), x(c + i + 3) };
                interleave_inputs(type, four, n, &inputs[i * row]);
            }
            o.repacked->gemm(n, results.data(), (size_t) n_r, w, inputs.data(), (int) n_c, n_r);
            for (int64_t i = 0; i < n_c; ++i, ++c) {
                memcpy(out(c), &results[(size_t) (i * n_r)], n_r * sizeof(float));
            }
        }
    }
    for (; c < c1; ++c) {
        o.repacked->gemv(n, out(c), (size_t) o.weights.ne[1], w, x(c), 1, n_r);
    }
}

// How an expert's product is cut into pieces: ggml's rule, so that the pieces are of a size that suits the caches.
struct cut {
    int64_t rows, cols;  // of a piece
    int64_t n_row_pieces;
    int32_t n;

    // `multiple`: of rows that stay together. `by_gemm`: few pieces in rows, since each interleaves its inputs for itself.
    cut(int64_t nr0, int64_t nr1, int nth, int64_t multiple, bool by_gemm) {
        const int64_t size = nr0 == 1 || nr1 == 1 ? 64 : 16;
        int64_t       n0   = (nr0 + size - 1) / size;
        int64_t       n1   = (nr1 + size - 1) / size;
        by_gemm            = by_gemm && nr1 >= 4;
        if (by_gemm) {
            n0 = std::min<int64_t>(n0, 2 * nth);
            n1 = (nr1 + GEMM_ROWS - 1) / GEMM_ROWS;
        } else if (n0 * n1 < nth * 4) {
            n0 = nr0 > nr1 ? nth : 1;
            n1 = nr0 > nr1 ? 1 : nth;
        }
        rows         = (nr0 + n0 - 1) / n0;
        rows         = (rows + multiple - 1) / multiple * multiple;
        cols         = by_gemm ? GEMM_ROWS : (nr1 + n1 - 1) / n1;
        n_row_pieces = n0;
        n            = (int32_t) (n0 * n1);
    }
};

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
        work(pass);
        owner_.idle();  // the others still compute: what is predicted now is read meanwhile
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
            owner_.inputs().add(expert_.layer(), part_, pass, x->data, x->ne[1], x->nb[1], x->nb[2]);
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
            o.repacked           = p == 0 ? expert_.repacked() : nullptr;
            o.by_gemm            = p == 0 && expert_.by_gemm();
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
        const cut  pieces(o.weights.ne[1], item.n_rows, params_->nth, o.repacked == nullptr ? 1 : o.repacked->columns,
                          o.by_gemm);
        const auto multiply = o.repacked == nullptr ? multiply_block : multiply_repacked;
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
        for (size_t i = 0; i < left.size(); ++i) {
            left[i] = (uint32_t) i;
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
                if (owner_.idle()) {
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
    for (const tensor_source & source : owner_->index().layers()[layer_].projections[part_].source) {
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
    session & owner = *owner_;
    if (!is_product(op, find_expert_tensor(op->src[0]) == this ? 0 : -1)) {
        // A graph that came after the session was started (an adapter, another kind of context).
        if (params->ith == 0) {
            if (op->view_src == nullptr) {
                memset(op->data, 0, ggml_nbytes(op));
            }
            refuse(op);
        }
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
            owner.route(layer_, ids, sel, (int32_t *) ids->data, nullptr, 0, 0, nullptr);
        }
        ggml_barrier(params->threadpool);
    }
    product(*this, params, op).run(*owner.pass());
    return true;
}

}  // namespace hobbit
