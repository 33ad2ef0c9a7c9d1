/* All CPUs exit at full speed: in each phase they read port `bytes`. Operations are those of all CPUs. */
#include "bench.h"

static u32 run(u16 port, u64 length)
{
    u32 done = 0, before = others_count();
    u64 end = ticks() + length;
    do {
        for (int i = 0; i < 64; i++)
            in(port);
        done += 64;
    } while (ticks() < end);
    return done + others_count() - before;
}

void main(void)
{
    start_others(parameters.phase->bytes);
    for (u32 i = 0; i < parameters.phases; i++) {
        u16 port = parameters.phase[i].bytes;
        *(volatile u16 *)AP_PORT = port;
        run(port, parameters.warmup);
        phase_begins();
        phase_ends(run(port, parameters.ticks));
    }
}
