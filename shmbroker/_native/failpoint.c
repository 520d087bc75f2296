/* failpoint.c */
typedef int sb_failpoint_placeholder;
