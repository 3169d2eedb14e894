/* For LD_PRELOAD: fsync and fdatasync that fail, or do nothing and say that they did; see bench/faults.py.
 *
 * The file that FSYNC_CONTROL names says which, by its first letter: f, every second call fails with EIO; l, none has an effect. What did
 * reach the disk is noted beside it, an inode a line, in FSYNC_CONTROL.synced, and each failure, a letter, in FSYNC_CONTROL.failed.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

static char read_mode(const char *control) {
    char mode = 0;
    int file = open(control, O_RDONLY | O_CLOEXEC);
    if (file < 0) return 0;
    if (read(file, &mode, 1) != 1) mode = 0;
    close(file);
    return mode;
}

static void note(const char *control, const char *suffix, unsigned long long number) {
    char path[4096];
    snprintf(path, sizeof path, "%s.%s", control, suffix);
    int file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (file < 0) return;
    dprintf(file, "%llu\n", number);
    close(file);
}

static int sync_file(int descriptor, const char *name) {
    static unsigned calls;
    const char *control = getenv("FSYNC_CONTROL");
    char mode = control ? read_mode(control) : 0;
    if (mode == 'l') return 0;
    if (mode == 'f' && __atomic_fetch_add(&calls, 1, __ATOMIC_RELAXED) % 2 == 0) {
        note(control, "failed", 1);
        errno = EIO;
        return -1;
    }
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    int code = real(descriptor);
    struct stat found;
    if (code == 0 && control && fstat(descriptor, &found) == 0) note(control, "synced", found.st_ino);
    return code;
}

int fsync(int descriptor) { return sync_file(descriptor, "fsync"); }
int fdatasync(int descriptor) { return sync_file(descriptor, "fdatasync"); }
