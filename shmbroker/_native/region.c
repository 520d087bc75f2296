/* region.c */
typedef int sb_region_placeholder;
