/* SPDX-License-Identifier: Apache-2.0
 *
 * The other end of a network's wire: standard input is a listening stream socket, whose first connection it serves.
 *     net_peer sink          reads and forgets
 *     net_peer source BYTES  writes frames of BYTES, each behind its length, as fast as they are taken
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BUFFER = 1 << 20, LENGTH = 4, ETHERNET = 14 };

static unsigned char buffer[BUFFER];

int main(int argc, char **argv)
{
    signal(SIGPIPE, SIG_IGN);
    int peer = accept(0, NULL, NULL);
    if (peer < 0 || argc < 2)
        return 1;
    if (!strcmp(argv[1], "sink")) {
        while (read(peer, buffer, BUFFER) > 0)
            ;
        return 0;
    }
    size_t size = argc > 2 ? strtoul(argv[2], NULL, 10) : 0, used = 0;
    if (size < ETHERNET || size > BUFFER - LENGTH)
        return 1;
    for (; used + LENGTH + size <= BUFFER; used += LENGTH + size) {
        unsigned char *frame = buffer + used;
        frame[0] = size >> 24, frame[1] = size >> 16, frame[2] = size >> 8, frame[3] = size;
        memset(frame + LENGTH, 0xff, 6); /* to all */
    }
    for (size_t sent = 0;;) {
        ssize_t done = write(peer, buffer + sent, used - sent);
        if (done <= 0)
            return 0;
        sent = (sent + done) % used;
    }
}
