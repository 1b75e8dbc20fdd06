/* The library's own threads, for frameworks that do not lend theirs.
 *
 * They are started when first needed and sleep in between. One caller at a time has them; one that
 * finds them busy does its work alone, and so does one for whom no thread could be started. A
 * forked child starts its own.
 */
#include "batchnorm.h"

#include <pthread.h>
#include <signal.h>

static pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER, lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
static unsigned started, wanted, running;
static void (*task)(void *);
static void *task_context;

static void *serve(void *unused)
{
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!wanted) pthread_cond_wait(&wake, &lock);
        wanted--;
        running++;
        pthread_mutex_unlock(&lock);
        task(task_context);
        pthread_mutex_lock(&lock);
        if (!--running) pthread_cond_signal(&done);
    }
    return unused;
}

/* In a forked child, which has none of its parent's threads. */
static void forget(void)
{
    pthread_mutex_init(&busy, NULL);
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&wake, NULL);
    pthread_cond_init(&done, NULL);
    started = wanted = running = 0;
}

/* Starts threads until there are so many, or no more can be had. */
static void start(unsigned helpers)
{
    static int registered;
    sigset_t all, before;
    pthread_t thread;
    if (started >= helpers) return;
    if (!registered) registered = pthread_atfork(NULL, NULL, forget) == 0;
    if (!registered) return;
    sigfillset(&all); /* a signal is for the program's own threads to handle */
    if (pthread_sigmask(SIG_SETMASK, &all, &before)) return;
    for (; started < helpers && !pthread_create(&thread, NULL, serve, NULL); started++)
        pthread_detach(thread);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

TN_EXPORT void tn_own_threads(void (*work)(void *), void *context, unsigned threads, unsigned flags)
{
    (void)flags;
    if (pthread_mutex_trylock(&busy)) {
        work(context);
        return;
    }
    pthread_mutex_lock(&lock);
    start(threads - 1);
    task = work;
    task_context = context;
    wanted = threads - 1;
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&lock);
    work(context);
    pthread_mutex_lock(&lock);
    wanted = 0; /* a thread that has not come by now would find nothing left to do */
    while (running) pthread_cond_wait(&done, &lock);
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&busy);
}
