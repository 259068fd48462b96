#include "hobbit-hooks.h"

extern "C" hobbit_hook_table * hobbit_hooks(void) {
    static hobbit_hook_table table = { nullptr, nullptr };
    return &table;
}
