#include "team.h"

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__) || defined(__APPLE__)
#include <signal.h>
#endif
#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <xmmintrin.h>
#endif

namespace experts {
namespace {

constexpr int64_t MAX_HELPERS = 255;
// About a small layer: shorter gaps in a run of calls cost no wake-up.
constexpr auto SPIN = std::chrono::microseconds(100);
constexpr int POLLS = 64;  // between looks at the clock, and before giving up the processor

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// While it lives, this thread rounds to nearest and keeps subnormal numbers, as Python's threads do. XLA's threads
// flush those to zero, and so would helpers that one of them has started: halves are widened through them.
class PlainFloats {
   public:
#if defined(__x86_64__) || defined(__i386__)
    PlainFloats() { _mm_setcsr(0x1f80); }
    ~PlainFloats() { _mm_setcsr(saved_); }

   private:
    const unsigned saved_ = _mm_getcsr();
#elif defined(__aarch64__)
    PlainFloats() {
        asm volatile("mrs %0, fpcr" : "=r"(saved_));
        asm volatile("msr fpcr, %0" ::"r"(uint64_t{0}));
    }
    ~PlainFloats() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

   private:
    uint64_t saved_;
#else
    PlainFloats() {}
    ~PlainFloats() {}
#endif
};

struct Job {
    Phase* phases;
    int64_t count, ranges;
    std::atomic<int64_t> joined{0};  // threads that work on it so far
    std::atomic<int64_t> left{0};    // helpers that took the job and are done with it
};

void work_on(Job& job) {
    const PlainFloats floats;
    const int64_t own = job.joined.fetch_add(1, std::memory_order_relaxed);
    for (Phase* phase = job.phases; phase < job.phases + job.count; ++phase) {
        int64_t done = 0;
        for (int64_t i = 0; i < job.ranges; ++i) {
            Phase::Range& range = phase->ranges[(own + i) % job.ranges];
            for (int64_t item; (item = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end; ++done)
                phase->work(phase->context, item);
        }
        if (done) phase->finished.fetch_add(done, std::memory_order_release);
        for (int polls = 0; phase->finished.load(std::memory_order_acquire) < phase->items;) {
            pause();
            if (++polls >= POLLS) std::this_thread::yield();
        }
    }
}

// One helper. `offer` holds null (free), a job it may take, or BUSY.
class Helper {
   public:
    Helper() : thread_([this] { serve(); }) {
#if defined(__linux__)
        known_ = !pthread_getaffinity_np(thread_.native_handle(), sizeof allowed_, &allowed_);
#endif
    }

    // `cpu`: the processor that the caller runs on.
    bool invite(Job* job, int cpu) {
        Job* expected = nullptr;
        if (!offer_.compare_exchange_strong(expected, job)) return false;
        keep_off(cpu);
        if (asleep_.load()) {
            std::lock_guard<std::mutex> hold(mutex_);
            wake_.notify_one();
        }
        return true;
    }

    // Whether the job was not taken, and now will not be.
    bool revoke(Job* job) { return offer_.compare_exchange_strong(job, nullptr); }

    void end() {
        {
            std::lock_guard<std::mutex> hold(mutex_);
            ending_.store(true);
            wake_.notify_one();
        }
        thread_.join();
    }

   private:
    // Linux likes to wake a helper on the processor of whoever wakes it, and then both take turns on it, for a slice
    // of some milliseconds each, until it balances its load (measured on two cores: 42 instead of 77 GB/s, and calls
    // of 4 ms for 0.35). So a helper may run anywhere the process may but there. It costs a system call where the
    // caller has moved.
    void keep_off(int cpu) {
#if defined(__linux__)
        if (!known_ || cpu < 0 || cpu == off_ || !CPU_ISSET(cpu, &allowed_) || CPU_COUNT(&allowed_) < 2) return;
        cpu_set_t rest = allowed_;
        CPU_CLR(cpu, &rest);
        off_ = cpu;
        pthread_setaffinity_np(thread_.native_handle(), sizeof rest, &rest);
#else
        (void)cpu;
#endif
    }

    static Job* busy() { return reinterpret_cast<Job*>(alignof(Job)); }

    void serve() {
        auto until = std::chrono::steady_clock::now() + SPIN;
        while (!ending_.load(std::memory_order_relaxed)) {
            for (int i = 0; i < POLLS && !offer_.load(std::memory_order_relaxed); ++i) pause();
            Job* job = offer_.load(std::memory_order_acquire);
            if (job && offer_.compare_exchange_strong(job, busy())) {
                work_on(*job);
                offer_.store(nullptr);
                job->left.fetch_add(1, std::memory_order_release);  // the last touch: the caller may return
                until = std::chrono::steady_clock::now() + SPIN;
            } else if (std::chrono::steady_clock::now() > until) {
                sleep();
                until = std::chrono::steady_clock::now() + SPIN;
            }
        }
    }

    void sleep() {
        std::unique_lock<std::mutex> hold(mutex_);
        asleep_.store(true);  // before the look at the offer, as `invite` does both in the other order
        wake_.wait(hold, [this] { return offer_.load() || ending_.load(); });
        asleep_.store(false);
    }

    std::atomic<Job*> offer_{nullptr};
    std::atomic<bool> asleep_{false}, ending_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
#if defined(__linux__)
    cpu_set_t allowed_;  // where the process may run
    bool known_ = false;
    std::atomic<int> off_{-1};
#endif
    std::thread thread_;  // after what it uses
};

// Never destroyed: helpers may still sleep when the process ends.
struct Helpers {
    std::mutex growing;
    std::vector<std::unique_ptr<Helper>> all;
    std::atomic<int64_t> count{0};
};

Helpers& helpers() {
    static Helpers& one = *[] {
        Helpers* made = new Helpers;
        made->all.reserve(MAX_HELPERS);  // never moved, so that others may read it while it grows
        return made;
    }();
    return one;
}

// The threads of all calls under way. A call takes what is left of the most that one ever asked for, and where
// nothing is left it waits: more threads than processors take turns on them, and whoever waits for a phase's end then
// waits for all the others' turns (measured on two cores, a prompt of 128 tokens whose shared experts ran beside the
// host experts: 1.5 times as long).
class HelperLease {
   public:
    int64_t take(int64_t wanted) {
        std::unique_lock<std::mutex> hold(mutex_);
        if (wanted > all_) all_ = wanted;
        freed_.wait(hold, [this] { return taken_ < all_; });
        const int64_t got = wanted < all_ - taken_ ? wanted : all_ - taken_;
        taken_ += got;
        return got;
    }

    void leave(int64_t got) {
        std::lock_guard<std::mutex> hold(mutex_);
        taken_ -= got;
        freed_.notify_all();
    }

   private:
    std::mutex mutex_;
    std::condition_variable freed_;
    int64_t all_ = 0, taken_ = 0;
};

HelperLease& lease() {
    static HelperLease& one = *new HelperLease;
    return one;
}

int64_t grow(int64_t wanted) {
    Helpers& pool = helpers();
    if (wanted > MAX_HELPERS) wanted = MAX_HELPERS;
    if (pool.count.load(std::memory_order_acquire) >= wanted) return wanted;
    std::lock_guard<std::mutex> hold(pool.growing);
#if defined(__linux__) || defined(__APPLE__)
    sigset_t every, before;  // signals are for the program's own threads
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before);
#endif
    try {
        while (static_cast<int64_t>(pool.all.size()) < wanted) {
            pool.all.push_back(std::make_unique<Helper>());
            pool.count.store(pool.all.size(), std::memory_order_release);
        }
    } catch (const std::exception&) {  // no more threads: those that there are will do
        wanted = pool.all.size();
    }
#if defined(__linux__) || defined(__APPLE__)
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
#endif
    return wanted;
}

void run_on(Phase* phases, int64_t count, int64_t threads) {
    Job job{phases, count, threads < 1 ? 1 : threads < MAX_RANGES ? threads : MAX_RANGES};
    for (Phase* phase = phases; phase < phases + count; ++phase)
        for (int64_t i = 0; i < job.ranges; ++i) {
            phase->ranges[i].next.store(i * phase->items / job.ranges, std::memory_order_relaxed);
            phase->ranges[i].end = (i + 1) * phase->items / job.ranges;
        }
    if (threads <= 1) return work_on(job);
    const int64_t known = grow(threads - 1);
    auto& all = helpers().all;
    int cpu = -1;
#if defined(__linux__)
    cpu = sched_getcpu();
#endif
    int64_t invited = 0;
    for (int64_t i = 0; i < known; ++i) invited += all[i]->invite(&job, cpu);
    work_on(job);
    for (int64_t i = 0; i < known && invited; ++i) invited -= all[i]->revoke(&job);
    for (int polls = 0; job.left.load(std::memory_order_acquire) < invited;) {
        pause();
        if (++polls >= POLLS) std::this_thread::yield();
    }
}

}  // namespace

void run_team(Phase* phases, int64_t count, int64_t threads) {
    if (threads <= 1) return run_on(phases, count, 1);
    struct Taken {
        int64_t count;
        ~Taken() { lease().leave(count); }
    } const taken = {lease().take(threads)};
    run_on(phases, count, taken.count);
}

void end_helpers() {
    Helpers& pool = helpers();
    std::lock_guard<std::mutex> hold(pool.growing);
    for (auto& helper : pool.all) helper->end();
    pool.all.clear();
    pool.count.store(0);
}

}  // namespace experts
