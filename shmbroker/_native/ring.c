/* ring.c */
typedef int sb_ring_placeholder;
