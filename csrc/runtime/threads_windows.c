/* threads.h on Windows 7 and newer. */
#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>

#include "threads.h"

#include <limits.h>

#include "clock.h"

#define SECOND 1000000000LL

_Static_assert(sizeof(os_mutex) == sizeof(SRWLOCK), "threads.h declares it without windows.h");
_Static_assert(sizeof(os_condition) == sizeof(CONDITION_VARIABLE), "likewise");

/* The ticks per second never change; asking for them takes as long as asking for the time. */
long long nanoseconds(void)
{
    static volatile LONG64 known;
    LARGE_INTEGER now, frequency;
    LONG64 second = known;
    if (!second) {
        QueryPerformanceFrequency(&frequency);
        known = second = frequency.QuadPart;
    }
    QueryPerformanceCounter(&now);
    return now.QuadPart / second * SECOND + now.QuadPart % second * SECOND / second;
}

int start_thread(os_thread *t, thread_result(THREAD_CALL *run)(void *), void *argument)
{
    (void)t;
    const HANDLE started = CreateThread(NULL, 0, run, argument, 0, NULL);
    return started && CloseHandle(started);
}

void keep_off_this_cpu(os_thread *t) { (void)t; }
void lift_restriction(os_thread *self) { (void)self; }

void lock(os_mutex *m) { AcquireSRWLockExclusive((SRWLOCK *)m); }
void unlock(os_mutex *m) { ReleaseSRWLockExclusive((SRWLOCK *)m); }

void wait_on(os_condition *c, os_mutex *m)
{
    SleepConditionVariableSRW((CONDITION_VARIABLE *)c, (SRWLOCK *)m, INFINITE, 0);
}

void wait_on_for(os_condition *c, os_mutex *m, long long timeout)
{
    const long long most = INT_MAX, milliseconds = (timeout + 999999) / 1000000;
    SleepConditionVariableSRW((CONDITION_VARIABLE *)c, (SRWLOCK *)m,
                              (DWORD)(milliseconds < most ? milliseconds : most), 0);
}

void signal_one(os_condition *c) { WakeConditionVariable((CONDITION_VARIABLE *)c); }
void signal_all(os_condition *c) { WakeAllConditionVariable((CONDITION_VARIABLE *)c); }

void yield_cpu(void) { SwitchToThread(); }

/* A process has an affinity within one group of up to 64 CPUs. Both masks are 0 if it has threads
 * in several groups. */
int count_cpus(void)
{
    DWORD_PTR cpus, of_system;
    if (GetProcessAffinityMask(GetCurrentProcess(), &cpus, &of_system) && cpus)
        return __builtin_popcountll(cpus);
    return (int)GetActiveProcessorCount(ALL_PROCESSOR_GROUPS);
}

void call_after_fork(void (*in_child)(void)) { (void)in_child; } /* Windows has no fork */
#else
typedef int qkv_nothing_here; /* a file must declare something */
#endif
