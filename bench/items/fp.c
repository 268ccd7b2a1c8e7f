/* Floating point: SSE2 scalar code as compilers make it, x87, and the C library's mathematics. */
#include "bench/items/items.h"

#include <math.h>
#include <string.h>

static uint64_t bits(double v)
{
	uint64_t u;

	memcpy(&u, &v, 8);
	return u;
}

#define N 160

static uint64_t run_matmul(struct bench *b)
{
	static double x[N][N], y[N][N], z[N][N];
	unsigned rounds = bench_rounds(b, 48);

	for (unsigned i = 0; i < N; i++)
		for (unsigned j = 0; j < N; j++) {
			x[i][j] = (double)(i * j % 17) / 7;
			y[i][j] = (double)(i + 2 * j) / 13;
		}
	for (unsigned r = 0; r < rounds; r++)
		for (unsigned i = 0; i < N; i++)
			for (unsigned j = 0; j < N; j++) {
				double s = r;

				for (unsigned k = 0; k < N; k++)
					s += x[i][k] * y[k][j];
				z[i][j] = s;
			}
	return bench_hash(0, z, sizeof z);
}

struct body {
	double x, y, z, vx, vy, vz, mass;
};

static uint64_t run_nbody(struct bench *b)
{
	struct body o[5];
	unsigned rounds = bench_rounds(b, 350000);
	uint64_t h = 0;

	for (unsigned i = 0; i < 5; i++)
		o[i] = (struct body){ i * 1.7, i * i * 0.9 - 2, 0.1 * i, 0.01 * i, 0.4 - 0.1 * i, 0.02, 4.0 / (1 + i * 10) };
	for (unsigned r = 0; r < rounds; r++) {
		for (unsigned i = 0; i < 5; i++)
			for (unsigned j = i + 1; j < 5; j++) {
				double dx = o[i].x - o[j].x, dy = o[i].y - o[j].y, dz = o[i].z - o[j].z;
				double d2 = dx * dx + dy * dy + dz * dz + 0.01, mag = 0.001 / (d2 * sqrt(d2));

				o[i].vx -= dx * o[j].mass * mag;
				o[i].vy -= dy * o[j].mass * mag;
				o[i].vz -= dz * o[j].mass * mag;
				o[j].vx += dx * o[i].mass * mag;
				o[j].vy += dy * o[i].mass * mag;
				o[j].vz += dz * o[i].mass * mag;
			}
		for (unsigned i = 0; i < 5; i++) {
			o[i].x += 0.001 * o[i].vx;
			o[i].y += 0.001 * o[i].vy;
			o[i].z += 0.001 * o[i].vz;
		}
	}
	for (unsigned i = 0; i < 5; i++)
		h = h * 31 + bits(o[i].x);
	return h;
}

static uint64_t run_mandel(struct bench *b)
{
	unsigned size = bench_rounds(b, 50) * 16;
	uint64_t sum = 0;

	for (unsigned i = 0; i < size; i++)
		for (unsigned j = 0; j < 352; j++) {
			double cr = 3.0 * j / 352 - 2, ci = 2.0 * i / size - 1, x = 0, y = 0;
			unsigned n = 0;

			for (; n < 200 && x * x + y * y < 4; n++) {
				double t = x * x - y * y + cr;

				y = 2 * x * y + ci;
				x = t;
			}
			sum = sum * 3 + n;
		}
	return sum;
}

static uint64_t run_mandel87(struct bench *b)
{
	unsigned size = bench_rounds(b, 70) * 8;
	uint64_t sum = 0;

	for (unsigned i = 0; i < size; i++)
		for (unsigned j = 0; j < 224; j++) {
			long double cr = 3.0L * j / 224 - 2, ci = 2.0L * i / size - 1, x = 0, y = 0;
			unsigned n = 0;

			for (; n < 200 && x * x + y * y < 4; n++) {
				long double t = x * x - y * y + cr;

				y = 2 * x * y + ci;
				x = t;
			}
			sum = sum * 3 + n;
		}
	return sum;
}

/* What x87 code of 32-bit programs looks like: loads, stores, comparisons, control word changes by integer conversion. */
static uint64_t run_x87(struct bench *b)
{
	static long double a[256];
	static double d[256];
	unsigned rounds = bench_rounds(b, 18000);
	uint64_t sum = 0;

	for (unsigned i = 0; i < 256; i++) {
		a[i] = (long double)(i + 1) / 3;
		d[i] = i * 0.25 - 20;
	}
	for (unsigned r = 0; r < rounds; r++)
		for (unsigned i = 0; i < 256; i++) {
			long double v = a[i] * d[i] + (long double)r / (i + 1);

			if (v > 1000)
				v -= a[255 - i];
			else
				v = -v;
			sum += (uint64_t)(int64_t)v;
			d[i] = (double)(v / 1024);
		}
	return sum;
}

static uint64_t run_x87_functions(struct bench *b)
{
	unsigned rounds = bench_rounds(b, 500000);
	long double sum = 0;

	for (unsigned r = 0; r < rounds; r++) {
		long double v = (long double)r / 1000 + 0.5L, s, c, l, a;

		__asm__ volatile("fsin" : "=t"(s) : "0"(v));
		__asm__ volatile("fcos" : "=t"(c) : "0"(v));
		__asm__ volatile("fyl2x" : "=t"(l) : "0"(v), "u"(1.0L) : "st(1)");
		__asm__ volatile("fpatan" : "=t"(a) : "0"(v), "u"(s) : "st(1)");
		sum += s * c + l - a;
	}
	return bits((double)sum);
}

static uint64_t run_libm(struct bench *b)
{
	unsigned rounds = bench_rounds(b, 800000);
	double sum = 0;

	for (unsigned r = 0; r < rounds; r++) {
		double v = (double)r / 5000 + 0.01;

		sum += sin(v) * cos(v * 1.5) + log(v) + exp(-v) + pow(v, 0.3) + atan2(v, sum) + cbrt(v);
	}
	return bits(sum);
}

static uint64_t run_fft(struct bench *b)
{
	enum { M = 4096 };
	static double re[M], im[M], wr[M / 2], wi[M / 2];
	unsigned rounds = bench_rounds(b, 650);

	for (unsigned i = 0; i < M / 2; i++) {
		wr[i] = cos(2 * M_PI * i / M);
		wi[i] = -sin(2 * M_PI * i / M);
	}
	for (unsigned i = 0; i < M; i++)
		re[i] = (double)(i * 37 % 101) / 50 - 1;
	for (unsigned r = 0; r < rounds; r++)
		for (unsigned half = M / 2; half; half /= 2)
			for (unsigned at = 0; at < M; at += 2 * half)
				for (unsigned k = 0; k < half; k++) {
					unsigned i = at + k, j = i + half, w = k * (M / 2 / half);
					double ur = re[i], ui = im[i], vr = re[i] - re[j], vi = im[i] - im[j];

					re[i] = (ur + re[j]) * 0.7;
					im[i] = (ui + im[j]) * 0.7;
					re[j] = (vr * wr[w] - vi * wi[w]) * 0.7;
					im[j] = (vr * wi[w] + vi * wr[w]) * 0.7;
				}
	return bench_hash(0, re, sizeof re);
}

static uint64_t run_convert(struct bench *b)
{
	unsigned rounds = bench_rounds(b, 24000000);
	uint64_t sum = 0;
	float f = 1.5f;

	for (unsigned r = 0; r < rounds; r++) {
		double d = (double)(int32_t)(r * 2654435761u) * 0.37;

		f = f * 0.999f + (float)d;
		sum += (uint64_t)(int64_t)d ^ (uint32_t)(int32_t)(f * 0.001f);
	}
	return sum;
}

static uint64_t run_solve(struct bench *b)
{
	static double m[128][129];
	unsigned rounds = bench_rounds(b, 110);
	uint64_t h = 0;

	for (unsigned r = 0; r < rounds; r++) {
		for (unsigned i = 0; i < 128; i++)
			for (unsigned j = 0; j < 129; j++)
				m[i][j] = (double)((i * 131 + j * 57 + r) % 97) + (i == j ? 1000 : 0);
		for (unsigned c = 0; c < 128; c++)
			for (unsigned i = c + 1; i < 128; i++) {
				double f = m[i][c] / m[c][c];

				for (unsigned j = c; j < 129; j++)
					m[i][j] -= f * m[c][j];
			}
		h = h * 31 + bits(m[127][128]);
	}
	return h;
}

const struct bench_item items_fp[] = {
	{ "float", "matmul", run_matmul },
	{ "float", "nbody", run_nbody },
	{ "float", "mandelbrot", run_mandel },
	{ "float", "fft", run_fft },
	{ "float", "solve", run_solve },
	{ "float", "convert", run_convert },
	{ "float", "libm", run_libm },
	{ "float", "x87-mandelbrot", run_mandel87 },
	{ "float", "x87-mixed", run_x87 },
	{ "float", "x87-functions", run_x87_functions },
	{ 0 },
};
