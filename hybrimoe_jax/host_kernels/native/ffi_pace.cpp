// The XLA FFI handlers of a paced device. A program begins with one and ends with the other, which sleeps until the
// program has lasted as long as it is told. Both are identities on a buffer: what is tied to them runs between them.
#if __has_include("xla/ffi/api/ffi.h")

#include <algorithm>
#include <chrono>
#include <cstring>
#include <mutex>
#include <thread>

#ifdef __linux__
#include <sys/prctl.h>
#endif

#include "experts.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Seconds = std::chrono::duration<double>;
using Instant = std::chrono::time_point<std::chrono::steady_clock, Seconds>;

constexpr Seconds SPIN(100e-6);  // a sleep ends some 50 us late; the rest is waited for awake

Instant now() { return std::chrono::steady_clock::now(); }

// Returns at `until`, or at once; what time it is then.
Instant sleep_until(Instant until) {
    if (until - SPIN > now()) {
#ifdef __linux__
        // The kernel may put the end of a sleep off by 50 us, to wake several threads at once.
        static thread_local const int at_once = prctl(PR_SET_TIMERSLACK, 1UL, 0UL, 0UL, 0UL);
        (void)at_once;
#endif
        std::this_thread::sleep_until(until - SPIN);
    }
    Instant woken = now();
    while (woken < until) woken = now();
    return woken;
}

// The device: one program at a time. Where programs of several threads meet they queue.
struct Device {
    std::mutex lock;
    Instant free{}, begun{};
    double programs = 0, late = 0, latest = 0;        // slept, and how much too long
    double overrun = 0, overran = 0;                  // programs that took longer than they were told, and how much
} device;

// What was computed stays where it is; where XLA could not give the operand's buffer it is copied.
void pass_on(const ffi::AnyBuffer& from, ffi::Result<ffi::AnyBuffer>& to) {
    if (to->untyped_data() != from.untyped_data()) std::memcpy(to->untyped_data(), from.untyped_data(), from.size_bytes());
}

// pace [2 or more]: the first two words are when the program was dispatched, a double of seconds. It begins then, or
// when the device is free, however late this thread was woken: dispatching is a part of what a program lasts.
ffi::Error begin(ffi::AnyBuffer x, ffi::Buffer<ffi::F32> pace, ffi::Result<ffi::AnyBuffer> out) {
    pass_on(x, out);
    if (pace.element_count() < 2) return ffi::Error::InvalidArgument("pace: when it was dispatched is missing");
    double seconds;
    std::memcpy(&seconds, pace.typed_data(), sizeof seconds);
    const std::lock_guard<std::mutex> held(device.lock);
    device.begun = std::min(now(), std::max(Instant(Seconds(seconds)), device.free));
    return ffi::Error::Success();
}

// seconds [1]: how long the program lasts.
ffi::Error end(ffi::AnyBuffer x, ffi::Buffer<ffi::F32> seconds, ffi::Result<ffi::AnyBuffer> out) {
    pass_on(x, out);
    const double asked = *seconds.typed_data();
    if (!(asked >= 0 && asked < 1e6))
        return ffi::Error::InvalidArgument("pace: seconds must be at least 0 and less than 1e6");
    Instant until;
    {
        const std::lock_guard<std::mutex> held(device.lock);
        until = device.free = std::max(device.free, device.begun) + Seconds(asked);
    }
    const Instant worked = now();
    const Instant woken = sleep_until(until);
    const std::lock_guard<std::mutex> held(device.lock);
    if (worked > until) {
        device.free = std::max(device.free, worked);
        device.overrun += 1;
        device.overran += (worked - until).count();
    } else {
        const double late = (woken - until).count();
        device.programs += 1;
        device.late += late;
        device.latest = std::max(device.latest, late);
    }
    return ffi::Error::Success();
}

}  // namespace

// report [5]: programs that slept, the sum of seconds that they slept too long, the longest; programs that took longer
// than they were told, and by how many seconds together. Counted since `reset`.
extern "C" EXPORTED void pace_report(double* report, int64_t reset) {
    const std::lock_guard<std::mutex> held(device.lock);
    const double counted[] = {device.programs, device.late, device.latest, device.overrun, device.overran};
    std::copy(std::begin(counted), std::end(counted), report);
    if (reset) device.programs = device.late = device.latest = device.overrun = device.overran = 0;
}

// Returns at `until`, seconds of the monotonic clock, or at once.
extern "C" EXPORTED void pace_sleep_until(double until) { sleep_until(Instant(Seconds(until))); }

extern "C" EXPORTED XLA_FFI_Error* pace_ffi_begin(XLA_FFI_CallFrame* frame);
extern "C" EXPORTED XLA_FFI_Error* pace_ffi_end(XLA_FFI_CallFrame* frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(pace_ffi_begin, begin,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(pace_ffi_end, end,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>());

#endif
