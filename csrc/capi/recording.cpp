// What a session saw: its timeline, what its routers chose and predicted, the inputs of its experts.
#include "common.h"

using hobbit::copy_out;
using hobbit::guarded;
using hobbit::require;

void hobbit_session_timeline(hobbit_session * s, bool on) {
    guarded(nullptr, [&] {
        if (s != nullptr) {
            s->core->times().enable(on);
        }
    });
}

void hobbit_session_decode_begin(hobbit_session * s) {
    guarded(nullptr, [&] {
        if (s != nullptr) {
            s->core->decode_begin();
        }
    });
}

void hobbit_session_decode_end(hobbit_session * s) {
    guarded(nullptr, [&] {
        if (s != nullptr) {
            s->core->decode_end();
        }
    });
}

uint64_t hobbit_session_timeline_read(hobbit_session * s, bool slowest, uint64_t max_events, hobbit_event * events) {
    uint64_t n = 0;
    guarded(nullptr, [&] {
        if (s != nullptr) {
            const auto found = s->core->times().events(slowest);
            n                = found.size();
            if (events != nullptr) {
                std::copy_n(found.begin(), std::min<uint64_t>(n, max_events), events);
            }
        }
    });
    return n;
}

hobbit_status hobbit_session_trace(hobbit_session * s, bool on, uint32_t depth, uint64_t max_tokens, hobbit_error * error) {
    return guarded(error, [&] {
        require(s != nullptr, "no session");
        on ? s->core->trace(depth, max_tokens) : s->core->traces().end();
    });
}

uint64_t hobbit_session_trace_read(hobbit_session * s, uint64_t max_rows, uint16_t * ids, float * weights) {
    return s == nullptr ? 0 : s->core->traces().read(max_rows, ids, weights);
}

uint64_t hobbit_session_trace_read_predictions(hobbit_session * s, uint64_t max_rows, uint16_t * ids, float * weights) {
    return s == nullptr ? 0 : s->core->traces().read_predictions(max_rows, ids, weights);
}

uint32_t hobbit_session_n_predicted(const hobbit_session * s) { return s == nullptr ? 0 : s->core->traces().n_predicted(); }

hobbit_status hobbit_session_collect_inputs(hobbit_session * s, bool on, bool rows, hobbit_error * error) {
    return guarded(error, [&] {
        require(s != nullptr, "no session");
        s->core->inputs().enable(s->core->index(), on, rows);
    });
}

bool hobbit_session_inputs(const hobbit_session * s, uint32_t layer, uint32_t part, hobbit_inputs * inputs) {
    return guarded(nullptr, [&] {
               require(s != nullptr && inputs != nullptr && layer < s->core->index().layers().size() &&
                           part < s->core->index().layers()[layer].projections.size(),
                       "no such projection");
               const auto &  of   = s->core->index().layers()[layer];
               const auto &  p    = of.projections[part];
               const auto *  data = s->core->inputs().find(layer, part);
               hobbit_inputs out  = {};
               out.n_expert       = of.n_expert;
               out.n_in           = (uint64_t) p.n_in;
               out.name           = p.name.c_str();
               out.sums           = data == nullptr ? nullptr : data->sums.data();
               out.counts         = data == nullptr ? nullptr : data->counts.data();
               if (const auto * batch = s->core->inputs().find_batch(layer, part)) {
                   out.rows     = batch->rows.data();
                   out.selected = batch->selected.data();
                   out.n_rows   = batch->rows.size() / out.n_in;
                   out.k        = batch->k;
               }
               copy_out(inputs, out);
           }) == HOBBIT_OK;
}
